"""The best placement by integer programming, or as near as the time allows, and a bound that no placement can beat.

Legend: B = batches, G = groups of batches, E = experts, S = slots (S = E where no expert has copies), R = ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from fairseq_moe_ext.balancing.load import Balance, balance
from fairseq_moe_ext.balancing.rules import Rules

# the solver looks at its clock rarely: with four times as many it overran 10 seconds by 18 (E = 512, R = 64)
MOST_COEFFICIENTS = 1_000_000
# the solver's constraints may be missed by so much, and its bound be too high by it
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Exact:
    """`ranks` (S,) int64; `bound`: no placement under the same rules has a smaller Avg Max Load on the same loads."""

    ranks: np.ndarray
    bound: float


def exact(loads: np.ndarray, rules: Rules, time_limit: float, starts: Sequence[np.ndarray]) -> Exact:
    """The placement of smallest Avg Max Load on loads (B, E) within `time_limit` seconds, ties by Max Load.

    The integer programme minimises the mean over batches of the busiest rank's share; the result is never worse than
    the best of `starts`, ranks (S,) that other methods found (one at least). Where the programme would be too large,
    neighbouring batches are averaged into groups: the busiest rank of an average is at most the average of the busiest
    ranks, hence the bound holds, though it is weaker, and a placement that is best for groups may be beaten.
    """
    slots = rules.split(loads)
    if not len(slots):
        return Exact(starts[0], 0.0)
    floors = lower_bounds(slots, rules)
    ranks, proved = _solve(slots, floors, rules, time_limit)
    candidates = [*starts] if ranks is None else [*starts, ranks]
    best = min(candidates, key=lambda ranks: slot_balance(slots, ranks, rules))
    bound = min(max(float(floors.mean()), proved - TOLERANCE), slot_balance(slots, best, rules).avg_max_load)
    return Exact(best, bound)


def slot_balance(slots: np.ndarray, ranks: np.ndarray, rules: Rules) -> Balance:
    """Max Load and Avg Max Load of slots' shares (B, S) on `ranks` (S,)."""
    return balance(slots @ np.eye(rules.world_size)[ranks])


def lower_bounds(slots: np.ndarray, rules: Rules) -> np.ndarray:
    """(B,) float64: what the busiest rank's share in a batch cannot fall below; slots' shares (B, S).

    It is at least the even share; the hottest slot with the coldest ones that must lie beside it; and, as of k R + 1
    slots some k + 1 share a rank, the k + 1 smallest of the k R + 1 largest.
    """
    falling = -np.sort(-slots, axis=1)
    num_slots, ranks = slots.shape[1], rules.world_size
    coldest = falling[:, num_slots - (rules.least - 1) :].sum(axis=1)
    floors = np.maximum(1 / ranks, falling[:, 0] + coldest)
    for k in range(1, (num_slots - 1) // ranks + 1):
        floors = np.maximum(floors, falling[:, k * ranks - k : k * ranks + 1].sum(axis=1))
    return floors


def _solve(slots: np.ndarray, floors: np.ndarray, rules: Rules, time_limit: float) -> tuple[np.ndarray | None, float]:
    """(ranks (S,) or None where none was found in time, the bound proved) of slots' shares (B, S), floors (B,)."""
    copies, ranks = rules.copies, rules.world_size
    num_experts = len(copies)
    groups = np.array_split(np.arange(len(slots)), min(len(slots), max(MOST_COEFFICIENTS // (num_experts * ranks), 1)))
    first_slots = np.searchsorted(rules.experts, np.arange(num_experts))
    per_copy = np.stack([slots[group].mean(axis=0) for group in groups])[:, first_slots]  # (G, E)
    weights = np.array([len(group) for group in groups]) / len(slots)

    # unknowns: x[expert, rank], 1 where the rank holds the expert, then t[group], the busiest rank's share
    def rows(of_x, of_t=None):
        nothing = sparse.csr_matrix((of_x.shape[0], len(groups)))
        return sparse.hstack([of_x, nothing if of_t is None else of_t], format="csr")

    each_rank = sparse.identity(ranks)
    shares_of_ranks = sparse.kron(sparse.csr_matrix(per_copy), each_rank)
    t_of_ranks = sparse.kron(sparse.identity(len(groups)), np.ones((ranks, 1)))
    constraints = [
        LinearConstraint(rows(-shares_of_ranks, t_of_ranks), 0, np.inf),
        LinearConstraint(rows(sparse.kron(sparse.identity(num_experts), np.ones((1, ranks)))), copies, copies),
        LinearConstraint(rows(sparse.kron(np.ones((1, num_experts)), each_rank)), rules.least, rules.most),
    ]
    # ranks are alike: the n-th expert by load may be told to lie on the ranks that those before it may have opened
    order = np.argsort(-per_copy.mean(axis=0) * copies, kind="stable")
    may_hold = np.empty((num_experts, ranks))
    may_hold[order] = np.arange(ranks) < np.cumsum(copies[order])[:, None]
    t_least = np.array([floors[group].mean() for group in groups])
    result = milp(
        c=np.concatenate([np.zeros(num_experts * ranks), weights]),
        constraints=constraints,
        integrality=np.concatenate([np.ones(num_experts * ranks), np.zeros(len(groups))]),
        bounds=Bounds(
            np.concatenate([np.zeros(num_experts * ranks), t_least]),
            np.concatenate([may_hold.ravel(), np.ones(len(groups))]),
        ),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    proved = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    if result.x is None:
        return None, proved
    expert, rank = np.nonzero(result.x[: num_experts * ranks].reshape(num_experts, ranks) > 0.5)
    assert np.array_equal(expert, rules.experts)  # as many ranks as copies, expert by expert
    return rank, proved
