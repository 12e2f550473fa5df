"""One call of a layer whose experts are in a buffer: copies that start as slots are free, steps as copies land."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from itertools import groupby

from fairseq_moe_ext.buffering.ahead import Ahead, Load
from fairseq_moe_ext.buffering.eviction import Access
from fairseq_moe_ext.buffering.slot_pool import Seat, SlotPool
from fairseq_moe_ext.experts.schedule import Step

_BEFORE = -1  # the turn before the first


class Call:
    """From the announcement of its counts to its last step; a Schedule.

    counts: H rows per expert. accesses: turns as the buffer's policy decided them. slot_of: of the layer's resident
    experts, which it keeps up to date. in_turn: whether experts are read and computed in just that order; else those
    with the most rows are read first (InfMoE, arXiv 2106.10715), and computed as they land, several at once. Results
    and who is resident afterwards do not depend on it, nor on the speed of copies. ahead: the layer's copies that began
    before. idle: called whenever no copy is under way or to come.
    """

    def __init__(
        self,
        counts: Sequence[int],
        accesses: Sequence[Access],
        slot_of: dict[int, int],
        pool: SlotPool,
        seat: Seat,
        load: Load,
        in_turn: bool,
        ahead: Ahead,
        idle: Callable[[], None] | None = None,
    ):
        self.counts = counts
        self.waited, self.read = 0.0, []  # seconds; bytes from disk of every miss
        self.hits = sum(access.hit for access in accesses)
        self._accesses, self._slot_of, self._in_turn = accesses, slot_of, in_turn
        self._pool, self._seat, self._load = pool, seat, load
        self._ahead, self._idle = ahead, idle
        self._copies: dict[int, tuple[int, Future]] = {}  # missed expert -> slot and copy, in the order started
        self._to_start = [access.expert for access in accesses if not access.hit]
        begun = ahead.keep(self._to_start)
        if self._to_start:
            pool.hold_ahead()
        self.prefetched = 0
        if not in_turn:
            self._to_start.sort(key=lambda expert: (expert not in begun, -counts[expert]))
        self._leave_after = _last_turns(accesses) if self._to_start else {}
        leaving = {expert for experts in self._leave_after.values() for expert in experts}
        self._passing = leaving.intersection(self._to_start)
        self._let_go([_BEFORE])

    def _let_go(self, turns: Iterable[int]) -> None:
        """After these turns were computed: slots of experts that leave are free, and copies begin in them."""
        for turn in turns:
            for expert in self._leave_after.pop(turn, ()):
                self._pool.give(self._seat, self._slot_of.pop(expert))
        while (expert := self._next()) is not None:
            self._to_start.remove(expert)
            begun = self._ahead.claim(expert, self._seat)
            self.prefetched += begun is not None
            self._copies[expert] = begun or self._start(expert, self._pool.take(self._seat))
        self._look_ahead()

    def _look_ahead(self) -> None:
        """A copy ahead beside one that is needed, of any layer, would delay it by as much as it gains."""
        if self._idle is not None and not self._to_start and not self._copies and not self._pool.is_busy:
            self._idle()

    def _next(self) -> int | None:
        """The next miss to be read, as soon as there is room.

        Misses that leave in this very call pass through their slots, the others stay: the last slot, for which the
        passing ones wait, is for none that stays.
        """
        room = self._pool.room(self._seat)
        if not self._to_start or not room:
            return None
        passing = [expert for expert in self._to_start if expert in self._passing]
        if self._in_turn or room > 1 or not passing or not self._passing.isdisjoint(self._copies):
            return self._to_start[0]
        return passing[0]

    def _start(self, expert: int, slot: int) -> tuple[int, Future]:
        return slot, self._pool.copy(slot, partial(self._load, expert))

    def steps(self, rows_per_expert: Sequence[int]) -> Iterator[Step]:
        """As `Schedule` has it: hits that follow one another are a step."""
        for turns in self._in_order() if self._in_turn else self._as_they_land():
            experts = [self._accesses[turn].expert for turn in turns]
            yield _together({expert: self._slot_of[expert] for expert in experts})
            self._let_go(turns)

    def _in_order(self) -> Iterator[list[int]]:
        for hit, turns in groupby(range(len(self._accesses)), lambda turn: self._accesses[turn].hit):
            if hit:
                yield list(turns)
                continue
            for turn in turns:
                self._take_in(self._accesses[turn].expert)
                yield [turn]

    def _as_they_land(self) -> Iterator[list[int]]:
        turn_of = {access.expert: turn for turn, access in enumerate(self._accesses) if not access.hit}
        if self.hits:
            yield [turn for turn, access in enumerate(self._accesses) if access.hit]
        while turn_of:
            if not self._copies:
                raise RuntimeError(f"no slot is left for experts {self._to_start}, and none will be")
            start = time.perf_counter()
            wait([copy for _, copy in self._copies.values()], return_when=FIRST_COMPLETED)
            self.waited += time.perf_counter() - start
            landed = [expert for expert, (_, copy) in self._copies.items() if copy.done()]
            for expert in landed:
                self._take_in(expert)
            yield [turn_of.pop(expert) for expert in landed]

    def _take_in(self, expert: int) -> None:
        slot, copy = self._copies[expert]
        start = time.perf_counter()
        self.read.append(self._pool.finish(copy))
        self.waited += time.perf_counter() - start
        del self._copies[expert]
        self._slot_of[expert] = slot
        self._look_ahead()

    def copy_again(self, load: Load) -> None:
        """Into the same slots, whose memory is another now."""
        self._load = load
        for expert, (slot, _) in self._copies.items():
            self._copies[expert] = self._start(expert, slot)

    def settle(self) -> None:
        """Until no copy of this call is under way; whatever comes into its slot comes later."""
        copies = [copy for _, copy in self._copies.values()]
        wait(copies)
        for copy in copies:
            if copy.exception() is None:
                self._pool.finish(copy)


def _last_turns(accesses: Sequence[Access]) -> dict[int, list[int]]:
    """Turn -> the experts whose slots nobody needs after it, though their eviction may come later: an expert that is
    idle in the batch leaves before the first turn."""
    found: dict[int, list[int]] = {}
    last: dict[int, int] = {}
    for turn, access in enumerate(accesses):
        if access.evicted is not None:
            found.setdefault(last.get(access.evicted, _BEFORE), []).append(access.evicted)
        last[access.expert] = turn
    return found


def _together(slot_of: dict[int, int]) -> Step:
    first, end = min(slot_of), max(slot_of) + 1
    return Step(first, end, [slot_of.get(expert, -1) for expert in range(first, end)])
