"""A safetensors file's tensors, each read by itself: nothing is mapped, so that a file may be larger than the memory.

The format: 8 bytes with the header's length, the header as JSON, the tensors' bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_ext.bounded_json import check_regular, parse_json
from fairseq_moe_ext.buffering.file_reading import read_at
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.safetensors_header import FLOATS, METADATA

_LARGEST_HEADER = 100_000_000  # as safetensors itself has it
_MOST_DIMS = 8


@dataclass(frozen=True)
class FileTensor:
    """A tensor that begins at byte `offset` of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values; CheckpointError where the file ends before them."""
        return self._read(None)[0]

    def read_with_checksum(self, target: Tensor | None = None) -> tuple[Tensor, int | None]:
        """The values and the CRC-32 of their bytes; errors as of `read`. target: of this dtype and shape, contiguous,
        is filled with them; None: a new tensor."""
        return self._read(0, target)

    def _read(self, crc: int | None, target: Tensor | None = None) -> tuple[Tensor, int | None]:
        values = torch.empty(self.shape, dtype=self.dtype) if target is None else target
        try:
            with open(self.file, "rb") as file:
                view = memoryview(values.view(-1).view(torch.uint8).numpy())
                return values, read_at(file.fileno(), view, self.offset, crc)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self.file}: truncated or damaged: {one_line(error)}") from error


@dataclass(frozen=True)
class SafetensorsFile:
    """What a file's header says: its metadata as it stands there, and its tensors in the header's order, unread."""

    metadata: dict[str, Any]
    tensors: dict[str, FileTensor]


def read_safetensors(path: Path, dtypes: Mapping[str, torch.dtype] = FLOATS) -> SafetensorsFile:
    """The file's header.

    CheckpointError where it is cut off or longer than it says, where a tensor is of none of `dtypes`, or where the
    tensors' bytes do not follow one another from the header to the end.
    """
    try:
        check_regular(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header must be a JSON object, got {type(header).__name__}")
        metadata = header.pop(METADATA, {})
        tensors = {key: _tensor(path, key, entry, 8 + length, dtypes) for key, entry in header.items()}
        end = 8 + length
        for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if tensor.offset != end:
                raise ValueError(f"{key[:80]} must begin where the one before it ends, {end}, got {tensor.offset}")
            end += tensor.nbytes
        if end != size:
            broke_off = "; did its download break off?" if size < end else ""
            raise ValueError(f"it must have {end} bytes, found {size}{broke_off}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {one_line(error)}") from error
    return SafetensorsFile(metadata if isinstance(metadata, dict) else {}, tensors)


def _tensor(path: Path, key: str, entry: Any, start: int, dtypes: Mapping[str, torch.dtype]) -> FileTensor:
    """start: where the tensors' bytes begin."""
    if not isinstance(entry, dict):
        raise ValueError(f"{key[:80]} must be described by a JSON object, got {type(entry).__name__}")
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in dtypes:
        what = "floats" if dtypes is FLOATS else " or ".join(dtypes)
        raise ValueError(f"{key[:80]} must be of {what}, got {str(dtype)[:20]}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{key[:80]} must have at most {_MOST_DIMS} sizes and two offsets, in whole numbers")
    first, last = offsets
    if last - first != math.prod(shape) * dtypes[dtype].itemsize:
        raise ValueError(f"{key[:80]} of shape {tuple(shape)} cannot have {last - first} bytes")
    return FileTensor(path, dtypes[dtype], tuple(shape), start + first)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
