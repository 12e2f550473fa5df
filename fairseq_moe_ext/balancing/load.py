"""Load statistics: how evenly a placement shares the work, and how the work falls on the experts.

Legend: B = batches (or steps), E = experts, R = ranks. A rank's *share* is its part of a batch's whole load.
Source: "Toward Efficient Inference for Mixture of Experts" (arXiv 2303.06182), its characterisation and its load
balancing; counting active experts in place of tokens: METRO (arXiv 2512.09277).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.trace import PhaseTrace

# tokens rule computation; active experts rule memory-bound decoding, where each active expert's weights are read once
OBJECTIVES = ("tokens", "active")


@dataclass(frozen=True, order=True)
class Balance:
    """How even a placement is over batches; the smaller the better, Avg Max Load first.

    `avg_max_load`: the mean over batches of the busiest rank's share; `max_load`: the busiest rank's share in any
    batch. Both from 1/R (even) to 1 (one rank has everything); 0 where there is no load at all.
    """

    avg_max_load: float
    max_load: float


def layer_load(trace: PhaseTrace, name: str, objective: str = "tokens", per_step: bool = False) -> np.ndarray:
    """(B, E) int64, what the experts of the layer called `name` had to do in every batch.

    Objective `tokens`: tokens; `active`: steps in which an expert had any token, which is how often its weights are
    read. The steps of a batch are added up, or each is a row of its own where `per_step`. ValueError where the trace
    lacks the layer.
    """
    if name not in trace.names:
        raise ValueError(f"the trace must hold the layer {name}; it holds {', '.join(trace.names)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    steps = trace.load[:, trace.names.index(name)].astype(np.int64)
    if objective == "active":
        steps = (steps > 0).astype(np.int64)
    if per_step:
        return steps
    numbers, row = np.unique(trace.batch, return_inverse=True)
    loads = np.zeros((len(numbers), steps.shape[1]), dtype=np.int64)
    np.add.at(loads, row, steps)
    return loads


def shares(loads: np.ndarray) -> np.ndarray:
    """(B', E) float64: each batch's load over the batch's sum; batches without load are left out.

    >>> shares(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25]]
    """
    sums = loads.sum(axis=1, keepdims=True)
    return loads[sums[:, 0] > 0] / sums[sums[:, 0] > 0]


def rank_shares(loads: np.ndarray, ranks_of_experts: Sequence[Sequence[int]], world_size: int) -> np.ndarray:
    """(B', R) float64: the ranks' shares of loads (B, E); an expert's copies share its load evenly."""
    fractions = np.zeros((len(ranks_of_experts), world_size))
    for expert, ranks in enumerate(ranks_of_experts):
        fractions[expert, list(ranks)] = 1 / len(ranks)
    return shares(loads) @ fractions


def balance(ranks: np.ndarray) -> Balance:
    """Max Load and Avg Max Load of ranks' shares (B, R), section on load balancing.

    >>> balance(np.array([[0.5, 0.5], [0.75, 0.25]]))
    Balance(avg_max_load=0.625, max_load=0.75)
    """
    if not len(ranks):
        return Balance(0.0, 0.0)
    largest = ranks.max(axis=1)
    return Balance(float(largest.mean()), float(largest.max()))


def expert_sparsity(loads: np.ndarray) -> float:
    """The mean over batches of the part of experts that idle, from 0 to 1; loads (B, E)."""
    return float((loads == 0).mean())


def hot_experts(loads: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64: the experts with the largest mean share of loads (B, E), hottest first, ties by number."""
    return np.argsort(-shares(loads).sum(axis=0), kind="stable")[:count]


def temporal_locality(loads: np.ndarray) -> float:
    """The mean over batches of how much of a batch's active set was active in the batch before, from 0 to 1.

    loads (B, E); a batch without an active expert is not counted; nan where none is left that follows another.
    """
    active = loads > 0
    now, before = active[1:], active[:-1]
    counted = now.any(axis=1)
    if not counted.any():
        return float("nan")
    return float(((now & before).sum(axis=1)[counted] / now.sum(axis=1)[counted]).mean())
