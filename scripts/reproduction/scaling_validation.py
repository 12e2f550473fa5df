"""The model of a step beside real ranks over gloo on this machine, with the routing that was recorded.

Legend: T = tokens of a rank, E = experts, K = choices per token, D = model dim, R = ranks.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.balancing.load import shares
from fairseq_moe_ext.balancing.placement import contiguous
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer, Top2Gate
from fairseq_moe_ext.gating.replicas import Replicas
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for
from fairseq_moe_ext.ranks.dispatcher import over_ranks
from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.process_group import start_group
from reproduction.cluster import Network
from reproduction.layer_costs import K, LayerCosts, Shape, measure_costs, measure_device
from reproduction.plots import COLOURS, MARKERS, panels, save
from reproduction.stacks import Stack, balanced
from reproduction.step_model import dynamic_layer, static_layer
from reproduction.tables import table, unique

RANKS = (1, 2, 4)  # gloo is calibrated on 2
TOKENS, MODEL_DIM, HIDDEN_DIM, FRACTION = 256, 256, 1024, 0.25
STEPS, ROUNDS = 3, 7
SMALL, LARGE = 1 << 10, 1 << 20  # bytes to each rank
EXCHANGE_ROUNDS = 30


@dataclass(frozen=True)
class ValidationRow:
    """A call of a MoE layer, milliseconds. together_ms: predicted, were every rank to have a core of its own."""

    stack: str
    ranks: int
    cores: int
    gating: str
    placement: str
    measured_ms: float
    predicted_ms: float
    together_ms: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class LayerRequest:
    """A layer to time. rows: assignments (steps, R, E) of ranks to experts; placement: per expert its rank."""

    gating: str
    model_dim: int
    hidden_dim: int
    fraction: float
    placement: list[int]
    rows: list[list[list[int]]]
    rounds: int


@dataclass(frozen=True)
class RankTimes:
    """Seconds, the fastest of the rounds. layers: of a call, mean over steps; exchange_small, exchange_large: of an
    exchange in which every rank sends SMALL, or LARGE, bytes to every other.
    """

    layers: list[float]
    exchange_small: float
    exchange_large: float


def validate(stack: Stack) -> list[ValidationRow]:
    """1, 2 and 4 ranks, static and dynamic, contiguous and balanced; the stack's first layer."""
    loads = stack.loads(per_step=False)[0]
    experts, cores = loads.shape[1], len(os.sched_getaffinity(0))
    first, held_out = loads[: (len(loads) + 1) // 2], loads[(len(loads) + 1) // 2 :]
    shape = Shape(experts, max(MODEL_DIM, experts), HIDDEN_DIM, 1, 1, 0, FRACTION)
    device = measure_device()
    costs = measure_costs(device, shape)
    cases, times = {}, {}
    for ranks in (each for each in RANKS if each <= experts):
        rows = np.array([[whole_rows(shares(held_out)[(step * ranks + rank) % len(shares(held_out))])
                          for rank in range(ranks)] for step in range(STEPS)])
        even = [at for (at,) in contiguous(experts, ranks)]
        settings = [("dynamic", "contiguous", even), ("static", "contiguous", even)]
        if ranks > 1:
            settings.insert(1, ("dynamic", "balanced", [at for (at,) in balanced(first, ranks, stack.kind)]))
        requests = [
            LayerRequest(gating, shape.model_dim, HIDDEN_DIM, FRACTION, places, rows.tolist(), ROUNDS)
            for gating, _, places in settings
        ]
        cases[ranks], times[ranks] = (rows, settings), time_ranks(ranks, requests)
    costs = costs.fastest(measure_costs(device, shape))  # before and after: what else ran may have come or gone
    gloo, found = calibrate(times[2]), []
    for ranks, (rows, settings) in cases.items():
        for (gating, placement, places), measured in zip(settings, times[ranks].layers, strict=True):
            predicted, together = (
                predict(gating, rows, places, costs, gloo, shape, available) for available in (cores, None)
            )
            found.append(ValidationRow(stack.title, ranks, cores, gating, placement, 1000 * measured,
                                       1000 * predicted, 1000 * together))
    return found


def predict(
    gating: str, rows: np.ndarray, places: Sequence[int], costs: LayerCosts, network: Network, shape: Shape,
    cores: int | None,
) -> float:
    """Seconds of a call; rows (steps, R, E)."""
    if gating == "static":
        return static_layer(TOKENS, rows.shape[1], costs, network, shape, cores).seconds
    return statistics.mean(dynamic_layer(step, places, costs, network, cores).seconds for step in rows)


def calibrate(times: RankTimes) -> Network:
    """gloo on this machine as the model has a network, from exchanges of two sizes between two ranks."""
    small, large = times.exchange_small, times.exchange_large
    bandwidth = (LARGE - SMALL) / max(large - small, 1e-9)
    message = max(small - SMALL / bandwidth, 0.0)
    return Network(bandwidth, bandwidth, bandwidth, latency=0.0, message=message)


def whole_rows(share: np.ndarray, tokens: int = TOKENS) -> list[int]:
    """Whole assignments (E,) of so many tokens in about these shares, at most one of an expert per token.

    >>> whole_rows(np.array([0.75, 0.25, 0.0]), 2)
    [2, 1, 1]
    """
    wanted = share * K * tokens
    rows = np.minimum(np.floor(wanted), tokens).astype(int)
    while rows.sum() < K * tokens:  # the one that lacks most and has room
        rows[np.argmax(np.where(rows < tokens, wanted - rows, -np.inf))] += 1
    return rows.tolist()


def time_ranks(ranks: int, requests: Sequence[LayerRequest]) -> RankTimes:
    """On R new processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_start, (ranks, folder, list(requests)), nprocs=ranks)
        return RankTimes(**json.loads((Path(folder) / "times.json").read_text()))


def tokens_for(rows: Sequence[int], experts: int, model_dim: int, seed: int) -> torch.Tensor:
    """Tokens (T, D) that a layer of `routed_layer` sends so: rows (E,), whose sum is K * T, none above T.

    A token carries its two experts in its first E columns, where the gate reads.
    """
    ids = np.repeat(np.argsort(-np.asarray(rows), kind="stable"), sorted(rows, reverse=True))
    tokens = len(ids) // K
    x = 0.1 * torch.randn(tokens, model_dim, generator=torch.Generator().manual_seed(seed))
    x[:, :experts] = 0
    x[torch.arange(tokens), torch.from_numpy(ids[:tokens].copy())] = 2.0
    x[torch.arange(tokens), torch.from_numpy(ids[tokens:].copy())] = 1.0
    return x


def routed_layer(request: LayerRequest, exchange: Exchange) -> MOELayer:
    """With this rank's experts, random but the same on every rank, and a gate that reads a token's first E columns."""
    torch.manual_seed(0)
    experts = len(request.placement)
    replicas = Replicas([(rank,) for rank in request.placement], exchange.rank, exchange.world_size)
    gate = Top2Gate(request.model_dim, experts, second_expert_policy="all")
    with torch.no_grad():
        gate.wg.weight.zero_()
        gate.wg.weight[:, :experts].fill_diagonal_(4.0)
    held = ResidentExperts(experts, request.model_dim, request.hidden_dim, local=replicas.local[exchange.rank])
    layer = MOELayer(gate, held, dispatcher_for(request.gating, StaticOptions(request.fraction))).eval()
    layer.requires_grad_(False)
    layer.prepare_for_serving(0)
    if exchange.world_size > 1:
        layer.use(dispatcher=over_ranks(layer.dispatcher, exchange.register(held, replicas)))
    return layer


def _layers(rank: int, ranks: int, requests: Sequence[LayerRequest]) -> list[float]:
    exchange, found = Exchange(start_group()), []
    for request in requests:
        layer = routed_layer(request, exchange)
        experts = len(request.placement)
        batches = [tokens_for(rows[rank], experts, request.model_dim, rank)[None] for rows in request.rows]
        found.append(statistics.mean(_timed(lambda x=x, layer=layer: layer(x), request.rounds) for x in batches))
    return found


def _exchange(ranks: int, size: int) -> float:
    sent, received = (torch.zeros(size * ranks, dtype=torch.uint8) for _ in range(2))
    sizes = [size] * ranks
    return _timed(lambda: dist.all_to_all_single(received, sent, sizes, sizes), EXCHANGE_ROUNDS)


def _timed(call: Callable[[], object], rounds: int) -> float:
    """The fewest seconds from a barrier until the last rank has ended; the same on every rank."""
    taken = torch.zeros(rounds + 1, dtype=torch.float64)
    for round_ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        call()
        taken[round_] = time.perf_counter() - start
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken[1:].min())


@torch.inference_mode()
def _start(rank: int, ranks: int, folder: str, requests: Sequence[LayerRequest]) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    times = RankTimes(_layers(rank, ranks, requests), _exchange(ranks, SMALL), _exchange(ranks, LARGE))
    if rank == 0:
        write_json(Path(folder) / "times.json", asdict(times))
    dist.barrier()
    dist.destroy_process_group()


def validation_section(rows: Sequence[ValidationRow]) -> str:
    several = [abs(row.error) for row in rows if row.ranks > 1]
    worst = max(rows, key=lambda row: abs(row.error))
    verdict = (
        f"The median error is {statistics.median(abs(row.error) for row in rows):.0%}"
        + (f", over several ranks {statistics.median(several):.0%}" if several else "")
        + f"; the largest {worst.error:+.0%} ({worst.gating}, {worst.placement}, {worst.ranks} ranks). "
    )
    order = _order_kept(rows)
    intro = (
        f"## The model beside real ranks\n\nA call of a MoE layer by ranks over gloo until the last has ended it: "
        f"{TOKENS} tokens a rank, model dim {MODEL_DIM}, hidden dim {HIDDEN_DIM}, static gating at a fraction of "
        f"{FRACTION:g}, experts and routing as recorded; the fastest of the calls, as whatever else runs only adds. "
        f"Costs are measured in one process, gloo on two ranks alone. These are {rows[0].cores} cores, so that more "
        "ranks than cores take turns: the prediction counts the sum of the work over the cores where that is more "
        "than the busiest rank's, and the last column says what it would be without.\n\n"
    )
    found = table(
        rows, ("routing of", "{.stack}"), ("ranks", "{.ranks}"), ("gating", "{.gating}"), ("placement", "{.placement}"),
        ("measured ms", "{.measured_ms:.1f}"), ("predicted ms", "{.predicted_ms:.1f}"), ("error", "{.error:+.0%}"),
        ("predicted, a core a rank", "{.together_ms:.1f}"),
    )
    return f"{intro}{found}\n\n{verdict}{order}"


def _order_kept(rows: Sequence[ValidationRow]) -> str:
    """In how many pairs of settings with the same number of ranks the model says rightly which is faster."""
    pairs = [
        (a, b) for number, a in enumerate(rows) for b in rows[number + 1 :] if (a.stack, a.ranks) == (b.stack, b.ranks)
    ]
    right = sum((a.measured_ms < b.measured_ms) == (a.predicted_ms < b.predicted_ms) for a, b in pairs)
    return f"Which of two settings is faster on as many ranks it says rightly in {right} of {len(pairs)} pairs."


def draw_validation(file: Path, rows: Sequence[ValidationRow]) -> None:
    """Predicted against measured; on the line they are equal."""
    figure, ((panel,),) = panels(1, 1, width=5.6, height=4.6)
    cases = list(dict.fromkeys((row.gating, row.placement) for row in rows))
    ranks = sorted(unique(rows, "ranks"))
    for row in rows:
        number = cases.index((row.gating, row.placement))
        panel.plot(row.measured_ms, row.predicted_ms, color=COLOURS[number], marker=MARKERS[ranks.index(row.ranks)],
                   linestyle="", markersize=8)
    for number, (gating, placement) in enumerate(cases):
        panel.plot([], [], color=COLOURS[number], linewidth=5, label=f"{gating}, {placement}")
    for number, count in enumerate(ranks):
        panel.plot([], [], "k", marker=MARKERS[number], linestyle="", label=f"{count} rank{'s' if count > 1 else ''}")
    times = [value for row in rows for value in (row.measured_ms, row.predicted_ms)]
    ends = 0.8 * min(times), 1.25 * max(times)
    panel.plot(ends, ends, color="grey", linewidth=1)
    panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured ms of a layer's call",
              ylabel="predicted ms")
    panel.legend(fontsize=8)
    save(figure, file)
