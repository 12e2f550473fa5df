"""Numbers that a layer leaves on the device, for readers who come later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DeviceCounts(Sequence):
    """Counts (E,) on a device as a sequence of int; reading the first one waits for the device and brings all of them.

    >>> list(DeviceCounts(torch.tensor([2, 0, 1])))
    [2, 0, 1]
    """

    def __init__(self, counts: Tensor):
        self._counts = counts
        self._numbers: list[int] | None = None

    def __len__(self) -> int:
        return self._counts.numel()

    def __getitem__(self, index):
        fetch([self])
        return self._numbers[index]


def fetch(many: Sequence[Sequence[int]]) -> None:
    """Bring those that are still on the device to the host, all in one copy."""
    waiting = [each for each in many if isinstance(each, DeviceCounts) and each._numbers is None]
    if not waiting:
        return
    numbers = torch.cat([each._counts for each in waiting]).tolist()
    for each in waiting:
        each._numbers, numbers = numbers[: len(each)], numbers[len(each) :]
