"""Misses of a buffer by size, order and policy on a recorded routing: on one rank, and on several by placement.

Legend: R = ranks, E = experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from fairseq_moe_ext.balancing.fit import phases_of_layers
from fairseq_moe_ext.balancing.load import layer_load
from fairseq_moe_ext.balancing.placement import LayerPlacement, contiguous
from fairseq_moe_ext.balancing.rules import rules_for
from fairseq_moe_ext.balancing.solvers import anti_correlation, greedy
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES
from fairseq_moe_ext.buffering.rounds import loads_of_ranks
from fairseq_moe_ext.buffering.simulation import MIN, LayerLoads, Outcome, layers_of, simulate
from fairseq_moe_ext.trace import PhaseTrace, halve_trace
from reproduction.models import Model
from reproduction.stacks import DECODER, Stack, stacks_of
from reproduction.tables import markdown

PAPERS_ORDER = "ascending"
PLACEMENTS = ("contiguous", "balanced")
RULES = (*POLICIES, MIN)


@dataclass(frozen=True)
class SimulatedRow:
    """A stack's buffers of one size: all layers' and ranks' accesses and misses together.

    size: experts per layer and rank, of `experts` that a rank holds. placement: `contiguous` where ranks is 1.
    worst_misses: of the rank that misses most.
    """

    model: str
    stack: str
    kind: str
    batch: int
    ranks: int
    placement: str
    experts: int
    size: int
    order: str
    policy: str
    accesses: int
    misses: int
    worst_misses: int

    @property
    def miss_rate(self) -> float:
        return self.misses / self.accesses if self.accesses else 0.0


def sizes_of(experts: int) -> list[int]:
    """1, a sixteenth of the experts, and every eighth up to all of them.

    >>> sizes_of(8)
    [1, 2, 3, 4, 5, 6, 7, 8]
    >>> sizes_of(32)
    [1, 2, 4, 8, 12, 16, 20, 24, 28, 32]
    """
    return sorted({1, max(1, experts // 16), *(-(-experts * eighth // 8) for eighth in range(1, 9))})


def simulate_one_rank(model: Model, trace: Mapping[str, PhaseTrace], batch: int, ranks: int) -> list[dict]:
    """The whole trace through one rank's buffers, as dicts of `SimulatedRow`; `ranks` is not needed."""
    layers = {layer.name: layer for layer in layers_of(trace)}
    rows = []
    for stack in stacks_of(model, trace):
        base = _base(model, stack, batch, 1, PLACEMENTS[0], stack.num_experts)
        rows += _rows(base, {0: [layers[name] for name in stack.steps]}, sizes_of(stack.num_experts))
    return rows


def simulate_ranks(model: Model, trace: Mapping[str, PhaseTrace], batch: int, ranks: int) -> list[dict]:
    """The trace's second half through the buffers of R ranks, under both placements; balanced is fitted on the first.

    Balanced is the paper's: greedy, for the MT decoder anti-correlation. Nothing where ranks outnumber experts.
    """
    stacks = stacks_of(model, trace)
    if min(stack.num_experts for stack in stacks) < ranks:
        return []
    first, second = halve_trace(dict(trace))
    start = min(int(part.batch.min()) for part in second.values())
    second = {phase: replace(part, batch=part.batch - start) for phase, part in second.items()}
    phases = phases_of_layers(dict(trace))
    kinds = {name: stack.kind for stack in stacks for name in stack.steps}
    experts = {name: trace[phase].load.shape[2] for name, phase in phases.items()}
    even = {name: contiguous(experts[name], ranks) for name in phases}
    fitted = {name: _place(layer_load(first[phase], name), ranks, kinds[name]) for name, phase in phases.items()}
    rows = []
    for placement, places in zip(PLACEMENTS, (even, fitted), strict=True):
        seen = loads_of_ranks(second, places, ranks)
        for stack in stacks:
            held = max(sum(rank in at for at in places[name]) for name in stack.steps for rank in range(ranks))
            of_ranks = {rank: [layer for layer in layers if layer.name in stack.steps] for rank, layers in seen.items()}
            rows += _rows(_base(model, stack, batch, ranks, placement, held), of_ranks, sizes_of(held))
    return rows


def _place(loads: np.ndarray, ranks: int, kind: str) -> LayerPlacement:
    rules = rules_for(np.ones(loads.shape[1], dtype=np.int64), ranks)
    return rules.layer((anti_correlation if kind == DECODER else greedy)(loads, rules))


def _base(model: Model, stack: Stack, batch: int, ranks: int, placement: str, experts: int) -> dict:
    return {"model": model.name, "stack": stack.title, "kind": stack.kind, "batch": batch, "ranks": ranks,
            "placement": placement, "experts": experts}


def _rows(base: dict, of_ranks: Mapping[int, Sequence[LayerLoads]], sizes: Iterable[int]) -> list[dict]:
    rows = []
    for size in sizes:
        for order in ORDERS:
            for policy in RULES:
                found = {rank: [_simulate(layer, size, order, policy) for layer in layers]
                         for rank, layers in of_ranks.items()}
                misses = [sum(each.misses for each in outcomes) for outcomes in found.values()]
                accesses = sum(each.accesses for outcomes in found.values() for each in outcomes)
                rows.append(asdict(SimulatedRow(
                    **base, size=size, order=order, policy=policy, accesses=accesses, misses=sum(misses),
                    worst_misses=max(misses),
                )))
    return rows


def _simulate(layer: LayerLoads, size: int, order: str, policy: str) -> Outcome:
    return simulate(layer, min(size, layer.num_experts), order, policy)


def misses_table(rows: Sequence[SimulatedRow]) -> str:
    """Miss rates at a quarter and at half of the experts."""
    at = {(row.stack, row.size, row.order, row.policy): row for row in rows}
    body = []
    for stack, experts in {row.stack: row.experts for row in rows}.items():
        of_stack = [row for row in rows if row.stack == stack]
        sizes = sorted({row.size for row in of_stack})
        for share in (0.25, 0.5):
            size = min(sizes, key=lambda each: abs(each - share * experts))
            for order in reversed(ORDERS):
                rates = [f"{at[stack, size, order, policy].miss_rate:.1%}" for policy in RULES]
                body.append((stack, of_stack[0].batch, f"{size} of {experts}", order, *rates))
    intro = (
        "Misses over accesses, simulated on a recorded routing (a served run has the same, below); `ascending` is the "
        "paper's order of computation, `resident-first` computes the experts first that are there. All policies let "
        "idle experts go first. MIN is Belady's, which knows the future.\n\n"
    )
    return intro + markdown(("stack", "batch", "buffer", "order", *RULES), body)


def ranks_table(rows: Sequence[SimulatedRow]) -> str:
    """Contiguous beside balanced, the paper's order, at half of a rank's experts."""
    body = []
    for stack in dict.fromkeys(row.stack for row in rows):
        for policy in RULES:
            cells = []
            for placement in PLACEMENTS:
                of_kind = [row for row in rows if (row.stack, row.placement, row.order, row.policy)
                           == (stack, placement, PAPERS_ORDER, policy)]
                row = min(of_kind, key=lambda each: abs(each.size - each.experts / 2))
                cells += [f"{row.size} of {row.experts}", f"{row.misses:,}", f"{row.worst_misses:,}"]
            body.append((stack, policy, *cells))
    head = ("stack", "policy", "buffer, contiguous", "misses", "worst rank", "buffer, balanced", "misses", "worst rank")
    intro = (
        "Misses of all ranks, and of the one that misses most, in the second half of the batches, in the paper's "
        "order; balanced placement (greedy, for the MT decoder anti-correlation) is fitted on the first half.\n\n"
    )
    return intro + markdown(head, body)
