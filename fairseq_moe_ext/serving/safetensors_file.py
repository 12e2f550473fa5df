"""A safetensors file's tensors, each read by itself: nothing is mapped, so that a file may be larger than the memory.

The format: 8 bytes with the header's length, the header as JSON, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_ext.buffering.file_reading import read_at
from fairseq_moe_ext.serving.errors import CheckpointError, one_line

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100_000_000  # as safetensors itself has it


@dataclass(frozen=True)
class FileTensor:
    """A tensor that begins at byte `offset` of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """The values; CheckpointError where the file ends before them."""
        values = torch.empty(self.shape, dtype=self.dtype)
        try:
            with open(self.file, "rb") as file:
                read_at(file.fileno(), memoryview(values.view(-1).view(torch.uint8).numpy()), self.offset, None)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self.file}: truncated or damaged: {one_line(error)}") from error
        return values


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """All tensors of the file, unread; CheckpointError where it is cut off, longer than it says, or not of floats."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _LARGEST_HEADER):
                raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for key, entry in header.items():
            shape, (first, last) = tuple(map(int, entry["shape"])), entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{key} must be of floats, got {entry['dtype']}")
            dtype = _DTYPES[entry["dtype"]]
            if min(shape, default=0) < 0 or last - first != math.prod(shape) * dtype.itemsize or first < 0:
                raise ValueError(f"{key} of shape {shape} cannot have {last - first} bytes")
            tensors[key] = FileTensor(path, dtype, shape, 8 + length + first)
            end = max(end, 8 + length + last)
        if end != size:
            raise ValueError(f"it must have {end} bytes, found {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {one_line(error)}") from error
    return tensors
