"""Copies of experts for which a layer has not been called yet: one at a time, into lent slots.

They change no result and no count of misses: an expert that was fetched ahead is a miss whose copy began earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, wait
from functools import partial

from torch import Tensor

from fairseq_moe_ext.buffering.slot_pool import Seat, SlotPool

Load = Callable[[int, list[Tensor]], int]  # fills an expert's parts; gives the bytes read from disk


class Ahead:
    """Of one layer; the slots are the pool's for all layers together, until a call claims them."""

    def __init__(self, pool: SlotPool):
        self._pool = pool
        pool.aheads.add(self)
        self._copies: dict[int, tuple[int, Future]] = {}  # expert -> slot and copy
        self._unwanted: list[tuple[int, Future]] = []  # whose slots are free when the copy has ended
        self._in_vain = self._bytes_in_vain = 0

    def begin(self, experts: Iterable[int], load: Load) -> None:
        """Fetch these one by one, but for those that are on their way, while there are slots."""
        self._sweep()
        for expert in experts:
            if not self._pool.room(self._pool.ahead):
                return
            if expert not in self._copies:
                slot = self._pool.take(self._pool.ahead)
                self._copies[expert] = slot, self._pool.copy_ahead(slot, partial(load, expert))

    def drop_queued(self) -> None:
        """Of the copies that were begun only those stay that are under way or done."""
        for expert, (slot, copy) in list(self._copies.items()):
            if copy.cancel():
                del self._copies[expert]
                self._pool.give(self._pool.ahead, slot)

    def keep(self, wanted: Collection[int]) -> set[int]:
        """Only the copies of `wanted` experts that are under way or done -> which these are."""
        self.drop_queued()
        self._unwanted += [each for expert, each in self._copies.items() if expert not in wanted]
        self._copies = {expert: each for expert, each in self._copies.items() if expert in wanted}
        self._sweep()
        return set(self._copies)

    def claim(self, expert: int, seat: Seat) -> tuple[int, Future] | None:
        """The slot and the copy of an expert that was kept; the slot is the layer's now. None: there is none."""
        found = self._copies.pop(expert, None)
        if found is not None:
            self._pool.hand_over(found[0], self._pool.ahead, seat)
        return found

    def take_in_vain(self) -> tuple[int, int]:
        """How many experts were fetched and not asked for since the last time, and their bytes from disk."""
        found = self._in_vain, self._bytes_in_vain
        self._in_vain = self._bytes_in_vain = 0
        return found

    def settle(self) -> None:
        """Until no copy is under way; what was fetched is nobody's."""
        self.keep(())
        wait([copy for _, copy in self._unwanted])
        self._sweep()

    def _sweep(self) -> None:
        under_way = []
        for slot, copy in self._unwanted:
            if not copy.done():
                under_way.append((slot, copy))
                continue
            self._pool.give(self._pool.ahead, slot)
            if copy.exception() is None:
                self._in_vain += 1
                self._bytes_in_vain += copy.result()[0]
        self._unwanted = under_way
