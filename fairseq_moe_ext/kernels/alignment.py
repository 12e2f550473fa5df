"""Where a tensor begins in memory, by which libraries round differently."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 64  # bytes, at which PyTorch's CPU tensors begin


def aligned(values: Tensor) -> Tensor:
    """`values`, or a copy of them that begins where PyTorch's own tensors do: the same expert may lie in any slot of a
    pool, its rows anywhere among the others'. Only odd dims are copied."""
    return values if is_aligned(values) else values.clone()


def is_aligned(values: Tensor) -> bool:
    """Whether `values` begin where PyTorch's own tensors do."""
    return values.data_ptr() % ALIGNMENT == 0
