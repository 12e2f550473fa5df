"""Copies that run beside the computation: by threads, and on a GPU by one, on a stream of its own.

A process forks when its copies have arrived; a forked child, which has none of its parent's threads, starts its own.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor


class CopyLane:
    """Runs copies into `slots` on `device`, begun in the order they were started, until it is closed.

    readers: how many run at a time; on a GPU one after another, as its stream has them. lands: whether a copy has ended
    only when it has arrived on a GPU, so that those behind it can still be cancelled; else when it is queued there.
    """

    def __init__(self, device: torch.device, slots: Iterable[Tensor], readers: int = 1, lands: bool = False):
        self._lands = lands
        self._device = device
        self._readers = 1 if device.type == "cuda" else readers
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads, self._process, self._closed = self._new_threads(), os.getpid(), False
        self._started: deque[Future] = deque()
        _lanes.add(self)
        if self._stream is not None:
            for slot in slots:  # whose memory must not be given away under a copy
                slot.record_stream(self._stream)

    def start(self, copy: Callable[[], int]) -> Future:
        """`copy` fills a slot; what the device was told until now to compute with that slot is done before."""
        computed = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        if self._process != os.getpid() and not self._closed:
            self._threads, self._process = self._new_threads(), os.getpid()
        while self._started and self._started[0].done():
            self._started.popleft()
        self._started.append(self._threads.submit(self._run, copy, computed))
        return self._started[-1]

    @property
    def is_busy(self) -> bool:
        """Whether a copy is under way or to come."""
        return any(not copy.done() for copy in self._started)

    def wait(self) -> None:
        """Until all copies that were started have ended, well or not."""
        wait(list(self._started))

    def _new_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=self._readers, thread_name_prefix="experts")

    def _run(self, copy: Callable[[], int], computed: torch.cuda.Event | None) -> tuple[int, torch.cuda.Event | None]:
        if self._stream is None:
            return copy(), None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            count, copied = copy(), self._stream.record_event()
        if self._lands:
            copied.synchronize()
        return count, copied

    def finish(self, copy: Future) -> int:
        """What `copy` gave, or its error; whatever the device is told from now on finds the slot filled."""
        count, copied = copy.result()
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return count

    def close(self, wait: bool = True) -> None:
        """End the threads after the copies that were started; a copy's error stays with its Future.

        wait: until they have ended; in any case until the device has done the copies of which it was told.
        """
        self._closed = True
        self._threads.shutdown(wait and self._process == os.getpid())
        if self._stream is not None:
            self._stream.synchronize()


_lanes: weakref.WeakSet[CopyLane] = weakref.WeakSet()


def _wait_for_all() -> None:
    """Else a child would find half a slot, and a copying thread's locks held for ever."""
    for lane in list(_lanes):
        lane.wait()


os.register_at_fork(before=_wait_for_all)
