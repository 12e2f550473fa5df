"""A tensor's values in another dtype, a piece at a time, and never an infinity where there was a number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fairseq_moe_ext.checkpoints.errors import CheckpointError

_PIECE = 1 << 26  # bytes of a tensor that are converted at a time


def rows_in_dtype(tensor: Tensor, dtype: torch.dtype, order: Tensor | None, name: str, flag: str) -> Iterator[Tensor]:
    """`tensor[order]` in `dtype`, some rows at a time; order: (V,) int64, None: as they are. The rest as `in_dtype`."""
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    step = max(1, _PIECE // max(1, tensor.shape[1:].numel() * dtype.itemsize))
    for start in range(0, len(tensor), step):
        part = slice(start, start + step)
        yield in_dtype(tensor[part if order is None else order[part]], dtype, name, flag)


def in_dtype(tensor: Tensor, dtype: torch.dtype, name: str, flag: str) -> Tensor:
    """`tensor` rounded to `dtype`, which the option `flag` asks for; CheckpointError where a number would become
    infinite."""
    result = tensor.to(dtype)
    most = torch.finfo(dtype).max
    if most < torch.finfo(tensor.dtype).max and (result.isinf() & ~tensor.isinf()).any():
        raise CheckpointError(
            f"{flag} must hold the values of {name}, up to {tensor[~tensor.isinf()].abs().max():g}, got "
            f"{str(dtype).removeprefix('torch.')}, which ends at {most:g}"
        )
    return result
