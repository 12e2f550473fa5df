"""Eviction that knows what comes: Belady's MIN, and what is left of it where only the next calls are known."""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_moe_ext.buffering.eviction import AGEING, Access


class Foresight:
    """A buffer of `size` experts in the order resident-first, which knows the next `horizon` batches; None: all.

    A missed expert need not stay. After a batch those of resident and active experts stay whose next known use is
    soonest; of those without one the most often used, as the policy `lfu` counts it. batches: active experts of every
    call to come; initial: who is resident at the start.
    """

    def __init__(
        self, batches: Sequence[Sequence[int]], size: int, initial: Sequence[int], horizon: int | None = None
    ):
        self._uses_at: dict[int, list[int]] = {}  # expert -> the batches that use it, the next one last
        for number in range(len(batches) - 1, -1, -1):
            for expert in batches[number]:
                self._uses_at.setdefault(expert, []).append(number)
        self.size, self._horizon = size, len(batches) if horizon is None else horizon
        self._number = -1
        self._used: dict[int, float] = {}
        self.resident: set[int] = set(initial)

    def run(self, active: Sequence[int]) -> tuple[list[Access], list[int]]:
        """The turns of the next batch, and who leaves: an idle expert before it, an active one after its turn."""
        self._number += 1
        self._used = {expert: used * AGEING for expert, used in self._used.items()}
        for expert in active:
            self._uses_at[expert].pop()
            self._used[expert] = self._used.get(expert, 0.0) + 1.0
        turns = sorted(active, key=lambda expert: (expert not in self.resident, expert))
        accesses = [Access(expert, expert in self.resident) for expert in turns]
        candidates = self.resident | set(active)
        stay = set(sorted(candidates, key=self._claim)[: self.size])
        self.resident = stay
        return accesses, sorted(candidates - stay)

    def _claim(self, expert: int) -> tuple[float, float, int]:
        uses = self._uses_at.get(expert)
        known = bool(uses) and uses[-1] <= self._number + self._horizon
        return uses[-1] if known else float("inf"), -self._used.get(expert, 0.0), expert


def misses_with_foresight(
    batches: Sequence[Sequence[int]], size: int, initial: Sequence[int], horizon: int | None = None
) -> int:
    """Misses of a `Foresight`.

    >>> batches = [[0], [1], [0], [2], [0], [1]]
    >>> [misses_with_foresight(batches, 1, [0], horizon) for horizon in (0, 1, None)]
    [4, 3, 3]
    """
    buffer = Foresight(batches, size, initial, horizon)
    return sum(not access.hit for active in batches for access in buffer.run(active)[0])
