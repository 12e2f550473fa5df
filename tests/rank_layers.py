"""MoE layers split over ranks: what a rank runs in a group (tests/rank_group.py), and the same on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from cases import Case
from torch import Tensor

from fairseq_moe_ext.experts.formats import FLOAT
from fairseq_moe_ext.experts.quantized import QuantizedExperts
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.call import LayerCall
from fairseq_moe_ext.gating.replicas import Replicas
from fairseq_moe_ext.ranks.dispatcher import over_ranks
from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.process_group import start_group

Placement = Sequence[Sequence[int]]  # per expert the ranks that hold it


@dataclass(frozen=True)
class Call:
    """One call of a layer: which one, and the batch, drawn by `seed`."""

    seed: int
    layer: int = 0
    rows: int = 3


@dataclass(frozen=True)
class Job:
    """Layers, where their experts lie, and what each rank calls, in order."""

    layers: Sequence[Case]
    placements: Sequence[Placement]
    calls: Sequence[Sequence[Call]]
    gating: str = "dynamic"
    static: dict = field(default_factory=dict)

    def build(self) -> list[MOELayer]:
        return [case.layer(self.gating, **self.static) for case in self.layers]

    def batch(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return self.layers[call.layer].with_(seed=call.seed, rows=call.rows).batch()


@dataclass(frozen=True)
class Served:
    """What one rank has to show: per call its output and its LayerCall, and what the exchange counted."""

    outputs: list[Tensor]
    calls: list[LayerCall]
    rows_computed: list[int]
    rounds: int
    idle_rounds: int


def quantized(experts: ResidentExperts, name: str, state: dict[str, Tensor]) -> QuantizedExperts:
    """In the place of `experts`, with the weights of the state dict."""
    found = QuantizedExperts.in_place_of(experts, name)
    found.load_state_dict(state)
    return found


def split_layer(
    layer: MOELayer, placement: Placement, rank: int, world_size: int, exchange: Exchange, weights: str = FLOAT
) -> None:
    """Leave `layer` the experts of `rank` alone, and connect it with the other ranks; weights: one of FORMATS."""
    replicas = Replicas(placement, rank, world_size)
    experts, state = layer.experts.share(replicas.local[rank]).to(layer.experts.dtype), layer.experts.state_dict()
    if weights == FLOAT:
        experts.load_state_dict(state)
    else:
        experts = quantized(experts.train(layer.training), weights, state)
    layer.use(experts=experts, dispatcher=over_ranks(layer.dispatcher, exchange.register(experts, replicas)))


def serve(rank: int, world_size: int, job: Job) -> Served:
    """This rank's calls of `job`, then answers until all are done."""
    exchange = Exchange(start_group())
    layers = job.build()
    for layer, placement in zip(layers, job.placements, strict=True):
        split_layer(layer, placement, rank, world_size, exchange)
    outputs, calls = _run(layers, job, job.calls[rank])
    while exchange.idle_round(alive=False):
        pass
    return Served(outputs, calls, exchange.rows_computed, exchange.rounds, exchange.idle_rounds)


def alone(job: Job, rank: int) -> tuple[list[Tensor], list[LayerCall]]:
    """What one rank with all experts makes of `rank`'s calls."""
    return _run(job.build(), job, job.calls[rank])


@torch.no_grad()
def _run(layers: list[MOELayer], job: Job, calls: Sequence[Call]) -> tuple[list[Tensor], list[LayerCall]]:
    outputs, seen = [], []
    for call in calls:
        layer = layers[call.layer]
        layer.observe(seen.append)
        outputs.append(layer(*job.batch(call)))
    return outputs, seen


def contiguous(num_experts: int, world_size: int) -> list[list[int]]:
    """Uneven where R does not divide E."""
    return [[expert * world_size // num_experts] for expert in range(num_experts)]


def shuffled(num_experts: int, world_size: int, seed: int = 0) -> list[list[int]]:
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[number % world_size] for number in order]


def replicated(num_experts: int, world_size: int) -> list[list[int]]:
    """The first expert everywhere, the second on two ranks, more ranks than experts or not."""
    placement = [[expert % world_size] for expert in range(num_experts)]
    placement[0] = list(range(world_size))
    placement[1] = sorted({1 % world_size, world_size - 1})
    return placement
