"""A recorded run played once more against a buffer, by two clocks: one of the disk (or link), one of the computation.

What things cost is told, nothing is measured, so that a replay is the same on every machine. A call of a MoE layer:

1. `dense_seconds`: all else that the model does before it. Only prefetches go on.
2. The gate is known. Missed experts are copied, those with the most rows first, as slots and readers are free;
   meanwhile all hits are computed in one go.
3. Of the misses all that have landed are computed together, until none is left; where none has, the computation waits.

In the order `ascending` experts are copied and computed in just that order.

Slots: a layer may always hold as many experts as its buffer keeps; `staging` more are for all layers together, for
experts on their way. Who leaves the buffer leaves its slot after its last turn in the call, or, idle, before it. Misses
that leave in the very call pass through their slots, the others stay: the last slot, for which the passing ones wait,
is for none that stays.

Prefetches have `ahead` slots of their own and a reader of their own, which begins one while no missed expert waits for
a slot, so that a needed copy shares the disk with one of them at most; with `alone`, as it is served, it begins only
while no needed one is on its way. Who is resident depends on no prefetch. At its layer's next call a prefetched expert
is a miss that is on its way or has landed, first in the order of reading; or it was read in vain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from fairseq_moe_ext.buffering.disk_clock import Disk, Read
from fairseq_moe_ext.buffering.eviction import Access, Buffer
from fairseq_moe_ext.buffering.foresight import Foresight
from fairseq_moe_ext.buffering.model_calls import ModelCall
from fairseq_moe_ext.buffering.prefetchers import Key, Nothing, Prefetcher
from fairseq_moe_ext.buffering.rates import Costs, Rates

_BEFORE = -1  # the turn before the first


def replay(
    calls: Sequence[ModelCall],
    buffers: Mapping[str, Buffer | Foresight],
    rates: Rates,
    prefetcher: Prefetcher | None = None,
    staging: int = 4,
    ahead: int = 4,
    in_turn: bool = False,
    of_phase: Mapping[str, Rates] | None = None,
    alone: bool = False,
) -> dict[str, Costs]:
    """Costs of every phase; reads in vain are those of the phase whose calls were under way when they began.

    calls: of a run (model_calls.py). buffers: of every layer, as they are before the run; they are used up. in_turn:
    whether experts are computed in just the order of their turns (`ascending`). of_phase: what computation costs in
    some phases, where it is not as `rates` say; the disk is theirs.
    """
    for name, value in (("staging", staging), ("ahead", ahead)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    replayed = _Replay(calls, buffers, rates, prefetcher or Nothing(), of_phase or {})
    replayed.staging, replayed.ahead, replayed.in_turn, replayed.alone = staging, ahead, in_turn, alone
    return replayed.run()


class _Replay:
    """One replay under way. Of a call: to_start: its missed experts that have no slot; queued: those that wait for a
    reader; on_way: those that have a slot and have not landed; landed: those that wait for the computation.

    staged: prefetched experts with the phase that began them; `_prefetch` is the one that is read, and `_is_vain` says
    that its layer's call has gone by without it.
    """

    staging: int
    ahead: int
    in_turn: bool
    alone: bool

    def __init__(self, calls, buffers, rates: Rates, prefetcher: Prefetcher, of_phase: Mapping[str, Rates]):
        self._calls, self._buffers, self._rates, self._prefetcher = calls, buffers, rates, prefetcher
        self._of_phase = {phase: of_phase.get(phase, rates) for phase in {call.phase for call in calls}}
        self._held = {name: len(tuple(buffer.resident)) for name, buffer in buffers.items()}  # slots, by layer
        self._disk = Disk(rates.disk_rate, rates.latency, rates.readers + 1, self._next_read, self._take_landed)
        self._resident = {name: set(buffer.resident) for name, buffer in buffers.items()}
        self._of: ModelCall = calls[0]
        self._accesses: list[Access] = []
        self._leave_after: dict[int, list[int]] = {}
        self._waited: float = 0
        self._to_start: list[int] = []
        self._passing: set[int] = set()
        self._queued: deque[int] = deque()
        self._on_way: set[int] = set()
        self._reading = 0
        self._landed: list[int] = []
        self._staged: dict[Key, str] = {}
        self._prefetch: Key | None = None
        self._is_vain = False
        self._candidates: Iterator[Key] = iter(())
        self._reads: dict[str, int] = {}
        self._in_vain: dict[str, int] = {}

    def run(self) -> dict[str, Costs]:
        """Of all calls."""
        found: dict[str, Costs] = {}
        for number, call in enumerate(self._calls):
            costs = self._call(number, call)
            found[call.phase] = found.get(call.phase, Costs()) + costs
        for key in list(self._staged):
            self._drop(key)
        return {
            phase: costs + Costs(reads=self._reads.get(phase, 0), in_vain=self._in_vain.get(phase, 0))
            for phase, costs in found.items()
        }

    def _call(self, number: int, call: ModelCall) -> Costs:
        start = self._disk.now
        costs = self._of_phase[call.phase]
        self._go_on(costs.dense_seconds)
        buffer = self._buffers[call.layer]
        accesses, self._leave_after = _turns(buffer, call)
        self._of, self._accesses, self._waited = call, accesses, 0
        self._resident[call.layer] = set(buffer.resident)
        self._begin([access.expert for access in accesses if not access.hit])
        self._candidates = iter(() if self._prefetcher.is_late else self._prefetcher.wanted(number))
        if self.in_turn:
            self._compute_in_turn()
        else:
            self._compute_as_they_land()
        if self._prefetcher.is_late:
            self._candidates = iter(self._prefetcher.wanted(number))
        return Costs(
            calls=1,
            accesses=len(accesses),
            misses=sum(not access.hit for access in accesses),
            seconds=self._disk.now - start,
            waited=self._waited,
            resident=costs.dense_seconds + costs.computation(call.load[call.load > 0]),
        )

    def _begin(self, missed: list[int]) -> None:
        """Of the experts missed some were prefetched; what was prefetched for this call besides is let go."""
        layer = self._of.layer
        for key in [key for key in self._staged if key[0] == layer and key[1] not in missed]:
            if key == self._prefetch:
                self._is_vain = True
            else:
                self._drop(key)
        self._to_start = missed
        if not self.in_turn:
            self._to_start.sort(key=lambda expert: ((layer, expert) not in self._staged, -int(self._of.load[expert])))
        self._passing = {expert for leaving in self._leave_after.values() for expert in leaving} & {*missed}
        self._let_go([_BEFORE])

    def _compute_in_turn(self) -> None:
        for hit, turns in groupby(range(len(self._accesses)), lambda turn: self._accesses[turn].hit):
            if hit:
                self._compute(list(turns))
                continue
            for turn in turns:
                expert = self._accesses[turn].expert
                self._wait(lambda expert=expert: expert in self._landed)
                self._landed.remove(expert)
                self._compute([turn])

    def _compute_as_they_land(self) -> None:
        turn_of = {access.expert: turn for turn, access in enumerate(self._accesses)}
        hits = [turn for turn, access in enumerate(self._accesses) if access.hit]
        if hits:
            self._compute(hits)
        left = len(self._accesses) - len(hits)
        while left:
            self._wait(lambda: bool(self._landed))
            landed, self._landed = self._landed, []
            self._compute([turn_of[expert] for expert in landed])
            left -= len(landed)

    def _compute(self, turns: list[int]) -> None:
        costs = self._of_phase[self._of.phase]
        missed = sum(not self._accesses[turn].hit for turn in turns)
        rows = (self._of.load[self._accesses[turn].expert] for turn in turns)
        self._go_on(costs.computation(rows) + missed * costs.miss_seconds)
        self._let_go(turns)

    def _let_go(self, turns: Iterable[int]) -> None:
        """After these turns were computed: slots of experts that leave are free, and other experts take them."""
        layer = self._of.layer
        for turn in turns:
            self._held[layer] -= len(self._leave_after.pop(turn, ()))
        while (expert := self._next_missed()) is not None:
            self._to_start.remove(expert)
            self._held[layer] += 1
            key = layer, expert
            if self._staged.pop(key, None) is None:
                self._queued.append(expert)
                self._on_way.add(expert)
            elif key == self._prefetch:
                self._on_way.add(expert)
            else:
                self._landed.append(expert)

    def _next_missed(self) -> int | None:
        """The missed expert that takes the next slot, where there is one."""
        room = self.staging + self._buffers[self._of.layer].size - self._held[self._of.layer]
        if not self._to_start or room <= 0:
            return None
        passing = [expert for expert in self._to_start if expert in self._passing]
        under_way = self._on_way.union(self._landed)
        if self.in_turn or room > 1 or not passing or not self._passing.isdisjoint(under_way):
            return self._to_start[0]
        return passing[0]

    def _go_on(self, seconds: float) -> None:
        self._disk.advance(self._disk.now + seconds)

    def _wait(self, ready: Callable[[], bool]) -> None:
        before = self._disk.now
        if not ready():
            self._disk.advance(None, ready)
        assert ready(), "a missed expert found no slot"
        self._waited += self._disk.now - before

    def _next_read(self) -> Read | None:
        if self._queued and self._reading < self._rates.readers:
            self._reading += 1
            return self._read((self._of.layer, self._queued.popleft()))
        if self._to_start or self._prefetch is not None or len(self._staged) >= self.ahead:
            return None
        if self.alone and self._on_way:
            return None
        for key in self._candidates:
            layer, expert = key
            is_coming = layer == self._of.layer and expert in self._on_way
            if expert not in self._resident[layer] and key not in self._staged and not is_coming:
                self._prefetch, self._is_vain = key, False
                self._staged[key] = self._of.phase
                return self._read(key)
        return None

    def _read(self, key: Key) -> Read:
        phase = self._of.phase
        self._reads[phase] = self._reads.get(phase, 0) + 1
        return key, self._rates.expert_bytes

    def _drop(self, key: Key) -> None:
        phase = self._staged.pop(key)
        self._in_vain[phase] = self._in_vain.get(phase, 0) + 1

    def _take_landed(self, key: Key) -> None:
        if key == self._prefetch:
            self._prefetch = None
            if key in self._staged:  # not claimed
                if self._is_vain:
                    self._drop(key)
                return
        else:
            self._reading -= 1
        self._on_way.remove(key[1])
        self._landed.append(key[1])


def _turns(buffer: Buffer | Foresight, call: ModelCall) -> tuple[list[Access], dict[int, list[int]]]:
    """The turns of a call, and turn -> the experts whose slots nobody needs after it."""
    found: dict[int, list[int]] = {}
    last: dict[int, int] = {}
    if isinstance(buffer, Foresight):
        accesses, leaving = buffer.run(call.active())
        last = {access.expert: turn for turn, access in enumerate(accesses)}
        for expert in leaving:
            found.setdefault(last.get(expert, _BEFORE), []).append(expert)
        return accesses, found
    accesses = buffer.run(call.active())
    for turn, access in enumerate(accesses):
        if access.evicted is not None:
            found.setdefault(last.get(access.evicted, _BEFORE), []).append(access.evicted)
        last[access.expert] = turn
    return accesses, found
