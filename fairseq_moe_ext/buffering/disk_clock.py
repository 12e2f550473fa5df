"""Reads that share a disk, or a link, in the time of a clock that is told: nothing here is measured.

A read has a latency, in which it takes nothing of the disk, and then its bytes, at its share of the disk's rate: reads
that transfer at one moment have equal shares. At most `readers` reads are under way. At one moment reads land first,
then others begin.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

Read = tuple[Hashable, float]  # whose, and its bytes


@dataclass
class _UnderWay:
    """begins: when its bytes begin to come. left: bytes that have not come yet."""

    begins: float
    left: float


class Disk:
    """next_read: the read that begins now, None where none can; landed: told of every read that is done.

    rate: bytes/s of all reads together. latency: seconds of each. `now` is the clock, in seconds. All numbers may be
    Fractions, and are exact then.

    >>> reads = [("a", 100), ("b", 100)]
    >>> disk = Disk(100, 0, 2, lambda: reads.pop() if reads else None, lambda key: print(key, disk.now))
    >>> disk.advance()
    b 2.0
    a 2.0
    """

    def __init__(
        self,
        rate: float,
        latency: float,
        readers: int,
        next_read: Callable[[], Read | None],
        landed: Callable[[Hashable], None],
    ):
        self._rate, self._latency, self._readers = rate, latency, readers
        self._next_read, self._landed = next_read, landed
        self._under_way: dict[Hashable, _UnderWay] = {}
        self.now: float = 0

    def advance(self, until: float | None = None, enough: Callable[[], bool] = lambda: False) -> None:
        """The clock goes on to `until`, or, where that is None, until nothing is under way; in both cases no further
        than to the moment when reads have landed and `enough` says so."""
        self._start_reads()
        while True:
            event = self._next_event()
            if event is None or until is not None and event > until:
                if until is not None:
                    self._pass(until)
                return
            done = self._pass(event)
            for key in done:
                del self._under_way[key]
            for key in done:
                self._landed(key)
            self._start_reads()
            if done and enough():
                return

    def _start_reads(self) -> None:
        while len(self._under_way) < self._readers and (read := self._next_read()) is not None:
            key, size = read
            self._under_way[key] = _UnderWay(self.now + self._latency, size)

    def _transferring(self) -> list[_UnderWay]:
        return [read for read in self._under_way.values() if read.begins <= self.now]

    def _next_event(self) -> float | None:
        """When the next read begins to transfer, or has come."""
        transferring = self._transferring()
        events = [read.begins for read in self._under_way.values() if read.begins > self.now]
        if transferring:
            events.append(self.now + min(read.left for read in transferring) * len(transferring) / self._rate)
        return min(events, default=None)

    def _pass(self, until: float) -> list[Hashable]:
        """Time goes on without an event before `until`; gives the reads that have come then."""
        transferring = self._transferring()
        done = []
        if transferring:
            come = (until - self.now) * self._rate / len(transferring)
            least = min(read.left for read in transferring)
            whole = self.now + least * len(transferring) / self._rate <= until  # as `_next_event` rounded it
            for key, read in self._under_way.items():
                if read.begins <= self.now:
                    if whole and read.left == least:
                        done.append(key)
                    read.left = max(read.left - come, 0)
        self.now = until
        return done
