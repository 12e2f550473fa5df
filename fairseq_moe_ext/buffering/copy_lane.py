"""Copies that run beside the computation: by a thread, and on a GPU on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class CopyLane:
    """Runs copies into `slots` on `device` one after another, in the order they were started, until it is closed."""

    def __init__(self, device: torch.device, slots: Iterable[Tensor]):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")
        if self._stream is not None:
            for slot in slots:  # whose memory must not be given away under a copy
                slot.record_stream(self._stream)

    def start(self, copy: Callable[[], int]) -> Future:
        """`copy` fills a slot; what the device was told until now to compute with that slot is done before."""
        computed = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        return self._threads.submit(self._run, copy, computed)

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
        self._threads.shutdown(wait)
        if self._stream is not None:
            self._stream.synchronize()
