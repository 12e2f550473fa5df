"""Where each expert's rows begin, on the device and on the host: neither waits for the other before it is asked.

Legend: E = experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor


class Offsets:
    """(E + 1,) int32, rising: expert e's rows are offsets[e] to offsets[e + 1].

    >>> offsets = Offsets.of_counts([2, 0, 1])
    >>> offsets.on_device.tolist(), offsets.part(1, 3).counts
    ([0, 2, 2, 3], [0, 1])
    """

    def __init__(self, on_device: Tensor | None, on_host: Tensor | None = None, device: torch.device | None = None):
        """One of the tensors, or both; on_device lies on `device`, which it need not say by itself."""
        self.device = on_device.device if device is None else torch.device(device)
        if on_device is not None and self.device.type == "cpu":
            on_host = on_device
        self._on_device, self._on_host = on_device, on_host

    @classmethod
    def of_counts(cls, rows_per_expert: Sequence[int], device: torch.device | str = "cpu") -> Offsets:
        """Of E counts that the host knows."""
        counts = torch.tensor([0, *rows_per_expert], dtype=torch.int32)
        return cls(None, counts.cumsum(0, dtype=torch.int32), torch.device(device))

    @property
    def on_device(self) -> Tensor:
        """(H + 1,) on the experts' device; copied there at the first use."""
        if self._on_device is None:
            self._on_device = self._on_host.to(self.device)
        return self._on_device

    @property
    def on_host(self) -> Tensor:
        """On the CPU; the first look at those of another device waits for it."""
        if self._on_host is None:
            self._on_host = self._on_device.cpu()
        return self._on_host

    @property
    def is_on_host(self) -> bool:
        """Whether they can be read without waiting for a device."""
        return self._on_host is not None

    def bring(self, on_host: Tensor) -> None:
        """The values have come to the host by another way."""
        self._on_host = on_host

    @cached_property
    def counts(self) -> list[int]:
        """E rows per expert; waits as `on_host`."""
        return self.on_host.diff().tolist()

    def part(self, first: int, end: int) -> Offsets:
        """Of the experts from `first` to before `end`."""
        part = slice(first, end + 1)
        on_host = None if self._on_host is None else self._on_host[part]
        return Offsets(None if self._on_device is None else self._on_device[part], on_host, self.device)

    def __len__(self) -> int:
        """E."""
        return (self._on_host if self._on_device is None else self._on_device).numel() - 1


class DeviceCounts(Sequence):
    """The counts between offsets as a sequence of int; reading one of them waits for the device and brings all.

    >>> list(DeviceCounts(Offsets(torch.tensor([0, 2, 2, 3]))))
    [2, 0, 1]
    """

    def __init__(self, offsets: Offsets):
        self._offsets = offsets

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index):
        return self._offsets.counts[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._offsets.counts)

    @property
    def waiting(self) -> Offsets | None:
        """What is still on the device alone."""
        return None if self._offsets.is_on_host else self._offsets


def fetch(many: Sequence[Sequence[int]]) -> None:
    """Bring those that are still on the device to the host, all in one copy."""
    waiting = [each.waiting for each in many if isinstance(each, DeviceCounts) and each.waiting is not None]
    if not waiting:
        return
    on_host = torch.cat([each.on_device for each in waiting]).cpu()
    for each, values in zip(waiting, on_host.split([len(each) + 1 for each in waiting]), strict=True):
        each.bring(values)
