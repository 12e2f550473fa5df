"""A recorded routing served through buffers of every size: hits and misses without weights.

Legend: E = experts of a layer. The same `Buffer` decides here and in a served run, so the misses are equal; a trace
says which experts have tokens, as dynamic gating runs them (static gating runs every expert in every batch).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES, Buffer, minimum_misses
from fairseq_moe_ext.trace import PHASES, PhaseTrace

MIN = "min"  # in the place of a policy: Belady's bound


@dataclass(frozen=True)
class LayerLoads:
    """One layer's calls in the order they were made: loads (calls, E), tokens per expert."""

    name: str
    loads: np.ndarray

    @property
    def num_experts(self) -> int:
        """E, of the layer."""
        return self.loads.shape[1]

    def batches(self) -> list[list[int]]:
        """The active experts of every call."""
        return [np.flatnonzero(load).tolist() for load in self.loads]


@dataclass(frozen=True)
class Outcome:
    """A layer under one buffer; accesses: hits and misses. `policy` may be MIN."""

    layer: str
    size: int
    order: str
    policy: str
    accesses: int
    misses: int

    @property
    def miss_rate(self) -> float:
        """Misses over accesses, 0 without an access."""
        return self.misses / self.accesses if self.accesses else 0.0


def layers_of(trace: Mapping[str, PhaseTrace]) -> list[LayerLoads]:
    """Every layer with its calls, those of several phases by batch and, within one, in the order of `PHASES`."""
    calls: dict[str, list[tuple[int, int, int, np.ndarray]]] = {}
    for phase, recorded in trace.items():
        for step, batch in enumerate(recorded.batch.tolist()):
            for name, load in zip(recorded.names, recorded.load[step], strict=True):
                calls.setdefault(name, []).append((batch, PHASES.index(phase), step, load))
    return [
        LayerLoads(name, np.stack([load for *_, load in sorted(each, key=lambda call: call[:3])]))
        for name, each in calls.items()
    ]


def hottest_experts(layer: LayerLoads) -> list[int]:
    """All E, those with the most tokens first; equals by id."""
    total = layer.loads.sum(axis=0, dtype=np.int64)
    return sorted(range(layer.num_experts), key=lambda expert: (-total[expert], expert))


def simulate(layer: LayerLoads, size: int, order: str, policy: str, ranking: Sequence[int] | None = None) -> Outcome:
    """`ranking`: whose first `size` are resident at the start, and who goes first among equals; default: by rising id,
    and no such choice."""
    batches = layer.batches()
    initial = list(range(layer.num_experts) if ranking is None else ranking)[:size]
    accesses = sum(map(len, batches))
    if policy == MIN:
        misses = minimum_misses(batches, size, order, initial)
    else:
        buffer = Buffer(size, policy, order, initial, ranking or ())
        misses = sum(not access.hit for batch in batches for access in buffer.run(batch))
    return Outcome(layer.name, size, order, policy, accesses, misses)


def simulate_all(
    layer: LayerLoads, sizes: Iterable[int] | None = None, ranking: Sequence[int] | None = None
) -> list[Outcome]:
    """Every order, policy and MIN, for every size (default: 1 to E)."""
    sizes = range(1, layer.num_experts + 1) if sizes is None else sizes
    return [
        simulate(layer, size, order, policy, ranking)
        for size in sizes
        for order in ORDERS
        for policy in (*POLICIES, MIN)
    ]
