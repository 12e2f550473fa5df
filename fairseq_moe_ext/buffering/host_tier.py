"""Main memory as a tier between a disk store and a GPU's slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_ext.buffering.store import ExpertStore, pin


@dataclass
class _Place:
    """One expert's parts in pinned memory. copied: when the last copy out of it is done; None on a CPU."""

    parts: list[Tensor]
    copied: torch.cuda.Event | None = None


class HostTier:
    """At most `capacity` (at least 1) experts of the store below in main memory, the least recently used leave.

    Every expert comes by way of a place here, since a file cannot be read into a GPU's memory.
    """

    def __init__(self, below: ExpertStore, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 expert, got {capacity}")
        self._below = below
        self._capacity = capacity
        self._places: OrderedDict[int, _Place] = OrderedDict()  # the least recently used first
        self._unused: list[_Place] = []  # whose expert could not be read
        self._pinned = False

    def load(self, expert: int, targets: Sequence[Tensor]) -> int:
        count = 0
        if expert in self._places:
            self._places.move_to_end(expert)
        else:
            place = self._free_place(targets)
            try:
                count = self._below.load(expert, place.parts)
            except Exception:
                self._unused.append(place)
                raise
            self._places[expert] = place
        place = self._places[expert]
        for target, part in zip(targets, place.parts, strict=True):
            target.copy_(part, non_blocking=True)
        if self._pinned:
            place.copied = torch.cuda.current_stream(targets[0].device).record_event()
        return count

    def _free_place(self, targets: Sequence[Tensor]) -> _Place:
        if self._unused:
            return self._unused.pop()
        if len(self._places) < self._capacity:
            place = _Place([torch.empty_like(target, device="cpu") for target in targets])
            self._pinned = self._pinned and pin(place.parts)
            return place
        _, place = self._places.popitem(last=False)
        if place.copied is not None:
            place.copied.synchronize()  # the last copy out of it may still be queued
        return place

    def convert(self, dtype: torch.dtype) -> None:
        self._below.convert(dtype)
        self._places.clear()
        self._unused.clear()

    def prepare(self, device: torch.device) -> None:
        self._below.prepare(device)
        self._pinned = device.type == "cuda"
