"""The head of a safetensors file that we write: where each tensor lies, and a checksum of each.

The format: 8 bytes with the header's length, the header as JSON, the tensors' bytes one after another. The checksums
are CRC-32 in the order of the tensors, 8 hex digits each, a string of the metadata: the header's length does not depend
on them, so that it can be written first and once more at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

METADATA = "__metadata__"
CHECKSUMS = "crc32"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes at which the tensors' bytes begin

TensorShape = tuple[str, torch.dtype, Sequence[int]]  # name, dtype, shape


def layout(tensors: Iterable[TensorShape], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header without the checksums, the tensors in this order."""
    header: dict[str, Any] = {METADATA: dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header


def header_bytes(header: Mapping[str, Any], checksums: Sequence[int], room: int = 0) -> bytes:
    """All before the tensors' bytes, which begin aligned. checksums: of the tensors, in their order.

    room: bytes that it takes, a multiple of ALIGNMENT; 0: as few as it needs.
    """
    metadata = {**header[METADATA], CHECKSUMS: " ".join(f"{crc:08x}" for crc in checksums)}
    text = json.dumps({**header, METADATA: metadata}).encode()
    text += b" " * (room - 8 - len(text) if room else -(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
