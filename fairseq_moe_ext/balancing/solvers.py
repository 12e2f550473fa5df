"""The paper's two placements: greedy, and greedy with anti-correlation.

Legend: B = batches, E = experts, S = slots (S = E where no expert has copies), R = ranks.
Source: "Toward Efficient Inference for Mixture of Experts" (arXiv 2303.06182), load balancing. The paper names no unit
for a load to which half a correlation is added; here 1 is the average slot's load, whatever the size of a batch.
"""

from __future__ import annotations

import numpy as np

from fairseq_moe_ext.balancing.rules import Rules

CORRELATION_WEIGHT = 0.5


def greedy(loads: np.ndarray, rules: Rules) -> np.ndarray:
    """Ranks (S,) int64: slots by mean share of loads (B, E), falling, each to the least loaded rank with room."""
    return _one_by_one(rules.split(loads), rules, None)


def anti_correlation(loads: np.ndarray, rules: Rules) -> np.ndarray:
    """Ranks (S,) int64 as `greedy`'s, where experts that are busy in the same batches repel each other.

    To a rank's load is added half of the sum of the Pearson correlations, over the batches of loads (B, E), between
    the slot to place and those already there. A slot whose share never changes correlates with nothing.
    """
    slots = rules.split(loads)
    return _one_by_one(slots, rules, CORRELATION_WEIGHT * correlations(slots))


def correlations(slots: np.ndarray) -> np.ndarray:
    """(S, S) float64: Pearson correlation between the columns of (B, S); 0 where a column is constant."""
    if not len(slots):
        return np.zeros((slots.shape[1],) * 2)
    centred = slots - slots.mean(axis=0)
    norms = np.sqrt((centred**2).sum(axis=0))
    norms[norms < 1e-12] = np.inf  # a constant's rounding noise is no movement
    centred /= norms
    return centred.T @ centred


def _one_by_one(slots: np.ndarray, rules: Rules, repulsion: np.ndarray | None) -> np.ndarray:
    """Place slots (B, S) in turn, each on the rank that costs least; `repulsion` (S, S): cost beside another slot."""
    num_slots = slots.shape[1]
    load = slots.sum(axis=0) * (num_slots / max(len(slots), 1))
    replicated = rules.copies[rules.experts] > 1
    ranks = np.full(num_slots, -1)
    rank_load, held = np.zeros(rules.world_size), np.zeros(rules.world_size, dtype=np.int64)
    repelled = np.zeros((rules.world_size, num_slots))
    # experts with copies come first: as long as each goes to the emptiest ranks, all find a rank without a sibling
    order = np.lexsort((rules.experts, -load, ~replicated))
    for placed, slot in enumerate(order):
        room = held < rules.most
        if np.maximum(rules.least - held, 0).sum() == num_slots - placed:
            room &= held < rules.least  # what is left is just enough to fill every rank to its least
        if replicated[slot]:
            room[ranks[(rules.experts == rules.experts[slot]) & (ranks >= 0)]] = False
            room &= held == held[room].min()
        rank = np.argmin(np.where(room, rank_load + repelled[:, slot], np.inf))
        ranks[slot] = rank
        rank_load[rank] += load[slot]
        held[rank] += 1
        if repulsion is not None:
            repelled[rank] += repulsion[slot]
    return ranks
