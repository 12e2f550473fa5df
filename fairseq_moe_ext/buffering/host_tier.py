"""Main memory as a tier between a disk store and a GPU's slots."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_moe_ext.buffering.store import ExpertStore, pin

_ALIGNMENT = 64


class _Place:
    """Room for one expert's parts: one allocation, and one event, since all of it is copied at a time."""

    def __init__(self, targets: Sequence[Tensor]):
        sizes = [-(-target.nbytes // _ALIGNMENT) * _ALIGNMENT for target in targets]
        self.memory = torch.empty(sum(sizes), dtype=torch.uint8)
        self.parts = [
            room[: target.nbytes].view(target.dtype).view(target.shape)
            for room, target in zip(self.memory.split(sizes), targets, strict=True)
        ]
        self._copied: torch.cuda.Event | None = None

    def copy_to(self, targets: Sequence[Tensor], stream: torch.cuda.Stream | None) -> None:
        """stream: on which the copies are only queued; None: they are done when this returns."""
        try:
            for target, part in zip(targets, self.parts, strict=True):
                target.copy_(part, non_blocking=True)
        finally:
            if stream is not None:
                self._copied = stream.record_event()

    def wait(self) -> None:
        """Until no copy out of it is queued."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


class HostTier:
    """At most `capacity` (at least 1) experts of the store below in main memory, the least recently used leave.

    Every expert comes by way of a place here, since a file cannot be read into a GPU's memory. Threads that load at a
    time, needed experts and those ahead, take turns.
    """

    def __init__(self, below: ExpertStore, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 expert, got {capacity}")
        self._below = below
        self._capacity = capacity
        self._places: OrderedDict[int, _Place] = OrderedDict()  # the least recently used first
        self._unused: list[_Place] = []  # whose expert could not be read
        self._on_gpu = self._pins = False
        self._turn = threading.Lock()

    def load(self, expert: int, targets: Sequence[Tensor]) -> int:
        """As `ExpertStore` has it; the store below is read on a miss only."""
        with self._turn:
            return self._load(expert, targets)

    def _load(self, expert: int, targets: Sequence[Tensor]) -> int:
        count = 0
        if expert in self._places:
            self._places.move_to_end(expert)
        else:
            place = self._free_place(targets)
            try:
                count = self._below.load(expert, place.parts)
            except BaseException:
                self._unused.append(place)
                raise
            self._places[expert] = place
        stream = torch.cuda.current_stream(targets[0].device) if self._on_gpu else None
        self._places[expert].copy_to(targets, stream)
        return count

    def _free_place(self, targets: Sequence[Tensor]) -> _Place:
        if self._unused:
            return self._unused.pop()
        if len(self._places) < self._capacity:
            place = _Place(targets)
            self._pins = self._pins and pin([place.memory])  # not again once it was refused
            return place
        expert, place = next(iter(self._places.items()))
        place.wait()
        del self._places[expert]
        return place

    def convert(self, dtype: torch.dtype) -> None:
        """As `ExpertStore` has it; what main memory holds is given up, and is read again."""
        self._below.convert(dtype)
        for place in self._places.values():
            place.wait()
        self._places.clear()
        self._unused.clear()

    def prepare(self, device: torch.device) -> None:
        """As `ExpertStore` has it; memory is pinned for a GPU."""
        self._below.prepare(device)
        self._on_gpu = self._pins = device.type == "cuda"
