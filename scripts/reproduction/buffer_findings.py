"""What the paper says of the expert buffer, held against the simulated and the served runs."""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_moe_ext.buffering.simulation import MIN
from reproduction.buffer_served import ServedRow, whole_rows
from reproduction.buffer_simulated import PAPERS_ORDER, PLACEMENTS, SimulatedRow
from reproduction.paper import paper_value
from reproduction.tables import Finding

SOURCE = "section on expert buffering"
FEWER = 0.01  # less is no difference
CLOSE = 1.1  # LIFO is close to MIN with at most so many times its misses


def findings(
    alone: Sequence[SimulatedRow], shared: Sequence[SimulatedRow], served: Sequence[ServedRow]
) -> list[Finding]:
    found = [_lifo_beats_fifo(alone, stack) for stack in dict.fromkeys(row.stack for row in alone)]
    for stack in dict.fromkeys(row.stack for row in shared):
        found += [_balanced_misses_fewer(shared, stack), _close_to_min(shared, stack)]
    return found + [_saves(served, model) for model in whole_rows(served)]


def _misses(rows: Sequence[SimulatedRow], policy: str, placement: str = "contiguous") -> dict[float, SimulatedRow]:
    """By size over the experts that a rank holds, those in which not all of them fit; the paper's order."""
    return {
        row.size / row.experts: row
        for row in rows
        if (row.order, row.policy, row.placement) == (PAPERS_ORDER, policy, placement) and row.size < row.experts
    }


def _lifo_beats_fifo(rows: Sequence[SimulatedRow], stack: str) -> Finding:
    of_stack = [row for row in rows if row.stack == stack]
    lifo, fifo = (_misses(of_stack, policy) for policy in ("lifo", "fifo"))
    fewer = sum(lifo[size].misses < fifo[size].misses for size in lifo)
    equal = sum(lifo[size].misses == fifo[size].misses for size in lifo)
    totals = [sum(row.misses for row in each.values()) for each in (lifo, fifo)]
    return Finding(
        f"LIFO beats FIFO ({of_stack[0].kind})", SOURCE,
        "in the paper's order of computation LIFO misses fewer over all sizes together, and more at none",
        f"fewer at {fewer} and equal at {equal} of {len(lifo)} sizes; {totals[0]:,} against {totals[1]:,} misses "
        f"over all of them ({stack})",
        totals[0] < totals[1] and fewer + equal == len(lifo),
    )


def _balanced_misses_fewer(rows: Sequence[SimulatedRow], stack: str) -> Finding:
    of_stack = [row for row in rows if row.stack == stack]
    lifo = [_misses(of_stack, "lifo", placement).values() for placement in PLACEMENTS]
    totals, worst = ([sum(getattr(row, name) for row in each) for each in lifo] for name in ("misses", "worst_misses"))
    return Finding(
        f"balanced placement lowers misses ({of_stack[0].kind})", SOURCE,
        f"under LIFO at least {FEWER:.0%} fewer misses of all ranks together, over all sizes, than under contiguous "
        "placement",
        f"{totals[1]:,} against {totals[0]:,} on {of_stack[0].ranks} ranks; of the rank that misses most {worst[1]:,} "
        f"against {worst[0]:,} ({stack})",
        totals[1] <= (1 - FEWER) * totals[0],
    )


def _close_to_min(rows: Sequence[SimulatedRow], stack: str) -> Finding:
    of_stack = [row for row in rows if row.stack == stack]
    (*even,), (lifo, least) = (
        [sum(row.misses for row in _misses(of_stack, policy, placement).values()) for policy in ("lifo", MIN)]
        for placement in PLACEMENTS
    )
    return Finding(
        f"LIFO with balanced placement comes very close to MIN ({of_stack[0].kind})", SOURCE,
        f"at most {CLOSE:g} times MIN's misses under the same placement, over all sizes",
        f"{lifo / least:.2f} times, contiguous {even[0] / even[1]:.2f} ({stack})",
        lifo <= CLOSE * least,
    )


def _saves(rows: Sequence[ServedRow], model: str) -> Finding:
    """At the smallest buffer; the paper's saving is of static gating's whole memory, ours of the weights."""
    whole = whole_rows(rows)[model]
    smallest = min((row for row in rows if row.model == model and row.size is not None), key=lambda row: row.size)
    saved, most = 1 - smallest.model_bytes / whole.model_bytes, paper_value("buffering.saved-most")
    return Finding(
        f"a small buffer saves up to {most:.1%} of the memory", SOURCE,
        "the smallest buffer that was served saves at least as large a share of the weights' bytes",
        f"{saved:.1%} with {smallest.size} of {smallest.experts} experts ({model}), at "
        f"{smallest.batch_ms / whole.batch_ms:.1f} times the time",
        saved >= most,
    )
