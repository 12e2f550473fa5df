"""The model of a step beside real ranks over gloo on this machine, with the routing that was recorded.

Legend: T = tokens of a rank, E = experts, R = ranks.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_moe_ext.balancing.load import shares
from fairseq_moe_ext.balancing.placement import contiguous
from reproduction.cluster import Network
from reproduction.layer_costs import K, LayerCosts, Shape, measure_costs, measure_device
from reproduction.plots import COLOURS, MARKERS, panels, save
from reproduction.rank_times import LARGE, SMALL, LayerRequest, RankTimes, time_ranks
from reproduction.scaling_rows import balanced
from reproduction.stacks import Stack
from reproduction.step_model import dynamic_layer, static_layer
from reproduction.tables import markdown

RANKS = (1, 2, 4)  # gloo is calibrated on 2
TOKENS, MODEL_DIM, HIDDEN_DIM, FRACTION = 256, 256, 1024, 0.25
STEPS, ROUNDS = 3, 7


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
            settings.insert(1, ("dynamic", "balanced", balanced(first, ranks, stack.kind)))
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


def validation_section(rows: Sequence[ValidationRow]) -> str:
    body = [
        (row.stack, row.ranks, row.gating, row.placement, f"{row.measured_ms:.1f}", f"{row.predicted_ms:.1f}",
         f"{row.error:+.0%}", f"{row.together_ms:.1f}")
        for row in rows
    ]
    head = ("routing of", "ranks", "gating", "placement", "measured ms", "predicted ms", "error",
            "predicted, a core a rank")
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
    return intro + markdown(head, body) + "\n\n" + verdict + order


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
    ranks = sorted({row.ranks for row in rows})
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
