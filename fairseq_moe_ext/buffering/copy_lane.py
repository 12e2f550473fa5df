"""Copies that run beside the computation: by a thread, and on a GPU on a stream of their own.

A process forks when its copies have arrived; a forked child, which has none of its parent's threads, starts its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor


class CopyLane:
    """Runs copies into `slots` on `device` one after another, in the order they were started, until it is closed."""

    def __init__(self, device: torch.device, slots: Iterable[Tensor]):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads, self._process, self._closed = _one_thread(), os.getpid(), False
        self._last: Future | None = None
        _lanes.add(self)
        if self._stream is not None:
            for slot in slots:  # whose memory must not be given away under a copy
                slot.record_stream(self._stream)

    def start(self, copy: Callable[[], int]) -> Future:
        """`copy` fills a slot; what the device was told until now to compute with that slot is done before."""
        computed = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        if self._process != os.getpid() and not self._closed:
            self._threads, self._process = _one_thread(), os.getpid()
        self._last = self._threads.submit(self._run, copy, computed)
        return self._last

    def wait(self) -> None:
        """Until all copies that were started have ended, well or not."""
        if self._last is not None:
            wait([self._last])

    def _run(self, copy: Callable[[], int], computed: torch.cuda.Event | None) -> tuple[int, torch.cuda.Event | None]:
        if self._stream is None:
            return copy(), None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            count = copy()
            return count, self._stream.record_event()

    def finish(self, copy: Future) -> int:
        """What `copy` gave, or its error; whatever the device is told from now on finds the slot filled."""
        count, copied = copy.result()
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return count

    def close(self, wait: bool = True) -> None:
        """End the thread after the copies that were started; a copy's error stays with its Future.

        wait: until it has ended; in any case until the device has done the copies of which it was told.
        """
        self._closed = True
        self._threads.shutdown(wait and self._process == os.getpid())
        if self._stream is not None:
            self._stream.synchronize()


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")


_lanes: weakref.WeakSet[CopyLane] = weakref.WeakSet()


def _wait_for_all() -> None:
    """Else a child would find half a slot, and the copying thread's locks held for ever."""
    for lane in list(_lanes):
        lane.wait()


os.register_at_fork(before=_wait_for_all)
