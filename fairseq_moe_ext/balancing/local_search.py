"""Local search: swap two slots, or move one, as long as that lowers Avg Max Load.

Legend: B = batches, E = experts, S = slots (S = E where no expert has copies), R = ranks.
"""

from __future__ import annotations

import time

import numpy as np

from fairseq_moe_ext.balancing.rules import Rules

# an exchange must lower Avg Max Load by more than rounding could
SMALLEST_GAIN = 1e-9
# how often a placement that nothing improves is shaken, and by how many swaps
KICKS, SWAPS_PER_KICK = 100, 4


def local_search(
    ranks: np.ndarray, loads: np.ndarray, rules: Rules, time_limit: float = np.inf, kicks: int = KICKS, seed: int = 1
) -> np.ndarray:
    """Ranks (S,) int64 of an Avg Max Load on loads (B, E) that is at most that of `ranks` (S,), the start.

    What is lowered is the mean over batches of the busiest rank's share: unlike Max Load, which a single batch
    decides, nearly every exchange changes it. Slot after slot does the best swap or move that it has, until none has
    one. Then a few random swaps shake the placement and all begins anew, `kicks` times; the best is kept. Ends early,
    with what it has, after `time_limit` seconds.
    """
    end = time.monotonic() + time_limit
    random = np.random.default_rng(seed)
    slots = rules.split(loads)
    if not len(slots):
        return ranks
    best = _Search(ranks, slots, rules)
    best.descend(end)
    for _ in range(kicks):
        if time.monotonic() >= end:
            break
        search = _Search(best.ranks, slots, rules)
        search.kick(random)
        search.descend(end)
        if search.value() < best.value():
            best = search
    return best.ranks


class _Search:
    """A placement and, to judge its neighbours, the ranks' shares (B, R)."""

    def __init__(self, ranks: np.ndarray, slots: np.ndarray, rules: Rules):
        self.ranks, self.slots, self.rules = ranks.copy(), slots, rules
        self.rank_shares = slots @ np.eye(rules.world_size)[ranks]
        self.holds = np.zeros((len(rules.copies), rules.world_size), dtype=bool)  # (E, R)
        self.holds[rules.experts, ranks] = True
        self.held = np.bincount(ranks, minlength=rules.world_size)

    def value(self) -> float:
        """Avg Max Load."""
        return float(self.rank_shares.max(axis=1).mean())

    def descend(self, end: float) -> None:
        """Exchange until nothing lowers Avg Max Load, or the clock says `end`."""
        slot = tried_in_vain = 0
        while tried_in_vain < len(self.ranks) and time.monotonic() < end:
            tried_in_vain = 0 if self.exchange(slot) else tried_in_vain + 1
            slot = (slot + 1) % len(self.ranks)

    def kick(self, random: np.random.Generator) -> None:
        """Some swaps of two random slots; a pair that may not swap is passed over."""
        for slot, partner in random.integers(len(self.ranks), size=(SWAPS_PER_KICK, 2)):
            rank, target = self.ranks[slot], self.ranks[partner]
            if self.may_swap(slot)[partner]:
                self._move(partner, rank)
                self._move(slot, target)

    def may_swap(self, slot: int) -> np.ndarray:
        """(S,) bool: the slots that `slot` may change ranks with: on other ranks, and no expert comes to lie twice."""
        experts = self.rules.experts
        return ~self.holds[experts[slot]][self.ranks] & ~self.holds[experts, self.ranks[slot]]

    def exchange(self, slot: int) -> bool:
        """Do the best swap or move of `slot`; False, and nothing done, where none lowers Avg Max Load."""
        rank = self.ranks[slot]
        without = self.rank_shares[:, rank] - self.slots[:, slot]  # (B,), where the slot is
        joined = self.rank_shares + self.slots[:, slot, None]  # (B, R), where it might go
        others = self._largest_of_others(rank)

        swaps = np.maximum(others[:, self.ranks], without[:, None] + self.slots)
        np.maximum(swaps, joined[:, self.ranks] - self.slots, out=swaps)
        swap_values = np.where(self.may_swap(slot), swaps.mean(axis=0), np.inf)

        moves = np.maximum(np.maximum(others, without[:, None]), joined)
        may_grow = ~self.holds[self.rules.experts[slot]] & (self.held < self.rules.most)
        may_grow &= self.held[rank] > self.rules.least
        move_values = np.where(may_grow, moves.mean(axis=0), np.inf)

        if min(swap_values.min(), move_values.min()) > self.value() - SMALLEST_GAIN:
            return False
        if move_values.min() < swap_values.min():
            self._move(slot, int(move_values.argmin()))
        else:
            partner = int(swap_values.argmin())
            target = int(self.ranks[partner])
            self._move(partner, rank)
            self._move(slot, target)
        return True

    def _largest_of_others(self, rank: int) -> np.ndarray:
        """(B, R): the largest share among the ranks that are neither `rank` nor the column's."""
        rest = self.rank_shares.copy()
        rest[:, rank] = 0
        rows = np.arange(len(rest))
        largest = rest.argmax(axis=1)
        first = rest[rows, largest]
        rest[rows, largest] = 0
        others = np.repeat(first[:, None], rest.shape[1], axis=1)
        others[rows, largest] = rest.max(axis=1)
        return others

    def _move(self, slot: int, target: int) -> None:
        source, expert = self.ranks[slot], self.rules.experts[slot]
        for rank, sign in ((source, -1), (target, 1)):
            self.rank_shares[:, rank] += sign * self.slots[:, slot]
            self.holds[expert, rank] = sign > 0
            self.held[rank] += sign
        self.ranks[slot] = target
