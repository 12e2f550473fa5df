"""What a placement of one layer must obey, and its slots: an expert, or one of its copies, that lies on one rank.

Legend: B = batches, E = experts, S = slots (S = E where no expert has copies), R = ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.balancing.load import shares
from fairseq_moe_ext.balancing.placement import LayerPlacement


@dataclass(frozen=True)
class Rules:
    """Every rank holds `least` to `most` of the S slots, and no expert twice.

    `experts` (S,) int64, rising: the expert that each slot is a copy of.
    """

    experts: np.ndarray
    world_size: int
    least: int
    most: int

    @property
    def copies(self) -> np.ndarray:
        """(E,) int64: slots per expert."""
        return np.bincount(self.experts)

    def split(self, loads: np.ndarray) -> np.ndarray:
        """(B', S) float64: the slots' shares of the experts' loads (B, E); copies share evenly."""
        return (shares(loads) / self.copies)[:, self.experts]

    def layer(self, ranks: np.ndarray) -> LayerPlacement:
        """The ranks of every expert, rising, of the ranks (S,) of every slot."""
        return tuple(tuple(sorted(ranks[self.experts == expert].tolist())) for expert in range(len(self.copies)))


def rules_for(copies: np.ndarray, world_size: int, experts_per_rank: int | None = None) -> Rules:
    """The rules for E experts of `copies` (E,) slots each: equal slots per rank, or as even as S and R allow.

    `experts_per_rank`: a memory budget; up to so many slots may then lie on a rank, and at least one, so that balance
    may be bought with memory. ValueError where the slots do not fill the ranks or do not fit on them.
    """
    experts, slots = np.repeat(np.arange(len(copies)), copies), int(copies.sum())
    if world_size > slots:
        raise ValueError(
            f"the world size must be at most the number of experts and replicas ({slots}), so that no rank is empty; "
            f"got {world_size}"
        )
    least, most = slots // world_size, -(-slots // world_size)
    if experts_per_rank is None:
        return Rules(experts, world_size, least, most)
    if experts_per_rank < most:
        raise ValueError(
            f"experts per rank must be at least {most} for {slots} experts and replicas on {world_size} ranks, "
            f"got {experts_per_rank}"
        )
    return Rules(experts, world_size, 1, experts_per_rank)
