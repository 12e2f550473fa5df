"""The full set of a layer's experts in slower memory, from which slots are filled.

Legend: H = local experts; parts = an expert's four tensors, in the order of EXPERT_KEYS. Experts are meant by
their index, 0 to H - 1.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger("fairseq_moe_ext")


READERS = 4  # threads that read at a time: one alone leaves a solid-state disk idle half of the time


class StoreError(Exception):
    """A store that cannot be made or read: names the file, the rule and what was found."""


class ExpertStore(Protocol):
    """Fills slots with experts, in the dtype that the model has gone to."""

    def load(self, expert: int, targets: Sequence[Tensor]) -> int:
        """Fill `targets`, one per part; gives the bytes read from disk.

        On a GPU the copies are only queued, on the current stream.
        """

    def convert(self, dtype: torch.dtype) -> None:
        """The model goes to `dtype`; every value takes this way too, so that rounding is that of resident experts."""

    def prepare(self, device: torch.device) -> None:
        """The slots lie on `device`."""


class HostStore:
    """All experts in this machine's memory: packed, one tensor per part, pinned where the slots are on a GPU.

    weights: H experts' parts; they are copied, into `dtype`.
    """

    def __init__(self, weights: Sequence[Sequence[Tensor]], dtype: torch.dtype):
        self._packed = [torch.empty((len(weights), *part.shape), dtype=dtype) for part in weights[0]]
        for index, parts in enumerate(weights):
            for packed, part in zip(self._packed, parts, strict=True):
                packed[index].copy_(part)

    def load(self, expert: int, targets: Sequence[Tensor]) -> int:
        """As `ExpertStore` has it; nothing is read from disk."""
        for packed, target in zip(self._packed, targets, strict=True):
            target.copy_(packed[expert], non_blocking=True)
        return 0

    def convert(self, dtype: torch.dtype) -> None:
        """As `ExpertStore` has it; one part after the other, so that only one is there in both dtypes."""
        for number, packed in enumerate(self._packed):  # one at a time: the old one goes when the new one is there
            self._packed[number] = packed.to(dtype)

    def prepare(self, device: torch.device) -> None:
        """As `ExpertStore` has it; memory is pinned for a GPU."""
        if device.type == "cuda":
            pin(self._packed)


class Source(Protocol):
    """Experts in files."""

    def fill(self, expert: int, part: int, target: Tensor) -> int:
        """Read one part into `target`, on the CPU, of any dtype; gives the bytes read."""

    def dtype(self, part: int) -> torch.dtype:
        """As it lies in the file."""


class LazyTensors:
    """A Source of tensors that stay in a file of their own until they are copied (serving's StoredTensor)."""

    def __init__(self, weights: Sequence[Sequence[Tensor]]):
        self._weights = weights

    def fill(self, expert: int, part: int, target: Tensor) -> int:
        """As `Source` has it."""
        tensor = self._weights[expert][part]
        target.copy_(tensor)
        return tensor.nbytes

    def dtype(self, part: int) -> torch.dtype:
        """As `Source` has it."""
        return self._weights[0][part].dtype


class FileStore:
    """Experts that are read from files into their slots every time; the process keeps none of them.

    dtype: the model's when the store is made.
    """

    readers = READERS

    def __init__(self, source: Source, dtype: torch.dtype):
        self._source = source
        self._dtypes = [dtype]  # that the model went through

    def load(self, expert: int, targets: Sequence[Tensor]) -> int:
        """As `ExpertStore` has it; every byte is read from the files."""
        return sum(self._load_part(expert, part, target) for part, target in enumerate(targets))

    def _load_part(self, expert: int, part: int, target: Tensor) -> int:
        way = [dtype for dtype, _ in groupby((self._source.dtype(part), *self._dtypes))]
        if len(way) <= 2:
            return self._source.fill(expert, part, target)
        value = torch.empty(target.shape, dtype=way[1])
        count = self._source.fill(expert, part, value)
        for dtype in way[2:-1]:
            value = value.to(dtype)
        target.copy_(value)
        return count

    def convert(self, dtype: torch.dtype) -> None:
        """As `ExpertStore` has it; what is read from now on goes this way."""
        self._dtypes.append(dtype)

    def prepare(self, device: torch.device) -> None:
        """Reads go to the CPU's memory; for slots on a GPU a HostTier stands in between."""


def pin(tensors: Sequence[Tensor]) -> bool:
    """Lock `tensors`, on the CPU, in memory, so that copies to a GPU run beside it; False, and a warning, if refused.

    The memory is registered where it lies: PyTorch's own pinned memory comes in powers of two.
    """
    runtime = torch.cuda.cudart()
    for tensor in tensors:
        if tensor.numel() == 0 or tensor.is_pinned():
            continue
        address = tensor.data_ptr()
        refusal = int(runtime.cudaHostRegister(address, tensor.nbytes, 0))
        if refusal:
            logger.warning(
                "%d bytes of experts cannot be pinned (CUDA error %d): copies to the GPU will be slower and wait",
                tensor.nbytes,
                refusal,
            )
            return False
        weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, address)
    return True
