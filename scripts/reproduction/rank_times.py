"""Real ranks over gloo: how long a MoE layer's call takes until the last rank has ended it, and what an exchange costs.

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
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer, Top2Gate
from fairseq_moe_ext.gating.copies import ExpertCopies
from fairseq_moe_ext.gating.layer import StaticOptions
from fairseq_moe_ext.ranks.exchange import Exchange
from reproduction.layer_costs import K

SMALL, LARGE = 1 << 10, 1 << 20  # bytes to each rank
EXCHANGE_ROUNDS = 30


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
    copies = ExpertCopies([(rank,) for rank in request.placement], exchange.rank, exchange.world_size)
    gate = Top2Gate(request.model_dim, experts, second_expert_policy="all")
    with torch.no_grad():
        gate.wg.weight.zero_()
        gate.wg.weight[:, :experts].fill_diagonal_(4.0)
    held = ResidentExperts(experts, request.model_dim, request.hidden_dim, held=copies.held[exchange.rank])
    layer = MOELayer(gate, held, request.gating, StaticOptions(request.fraction)).eval()
    layer.requires_grad_(False)
    layer.prepare_for_serving(0)
    if exchange.world_size > 1:
        layer.exchange = exchange.register(held, copies)
    return layer


def _layers(rank: int, ranks: int, requests: Sequence[LayerRequest]) -> list[float]:
    exchange, found = Exchange(rank, ranks), []
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
