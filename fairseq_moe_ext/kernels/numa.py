"""Machines whose memory lies in several nodes, each nearer to some of their CPUs: Linux puts a page on the node of the
thread that touches it first. In the C kernel every thread has rows of each weight that it computes first
(cpu/sharing.h); it touches these before they are filled. On a machine with one node nothing is done.

Legend: S = slots, M = output features, K = input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.block import QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import DTYPES, can_be_read, load_kernel
from fairseq_moe_ext.kernels.quantized_kernel import kernel_for

ONLINE = Path("/sys/devices/system/node/online")  # Linux


@lru_cache
def count_nodes() -> int:
    """Of this machine; 1 where the system does not say."""
    try:
        return count_numbers(ONLINE.read_text())
    except (OSError, ValueError):
        return 1


def count_numbers(ranges: str) -> int:
    """How many numbers a list of Linux has.

    >>> count_numbers("0-1,4")
    3
    """
    bounds = [(part.split("-") * 2) for part in ranges.strip().split(",")]
    return sum(int(last) - int(first) + 1 for first, last, *_ in bounds)


def touch_new(pool: Sequence[Tensor] | QuantizedPool) -> None:
    """Touch the memory of a pool (grouped_mlp.py) that has no values yet: what is there is lost. Nothing happens where
    there is one node, or no C kernel that would compute these weights."""
    if count_nodes() == 1:
        return
    if isinstance(pool, QuantizedPool):
        rows = torch.empty(0)
        quantized = kernel_for(rows, rows, pool)
        if quantized is not None:
            quantized.touch_pages(pool)
        return
    weights = [part for part in pool if part.dim() == 3 and part.numel() and part.dtype in DTYPES]
    kernel = load_kernel() if can_be_read(*weights) else None
    for weight in weights if kernel is not None else ():
        kernel.touch_pages(weight)


def converted_near(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """fn, by which a module changes its tensors' dtype or device, with new weights (S, M, K) on a CPU touched as
    `touch_new` does before values come."""
    if count_nodes() == 1:
        return fn

    def convert(tensor: Tensor) -> Tensor:
        like = fn(tensor[:0]) if tensor.dim() == 3 and tensor.is_cpu else tensor
        if like.dtype == tensor.dtype or not like.is_cpu:
            return fn(tensor)
        found = torch.empty_like(tensor, dtype=like.dtype)
        touch_new([found])
        return found.copy_(tensor)

    return convert
