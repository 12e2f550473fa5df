"""One linear layer per expert, each on its own rows: on a CPU the C kernel of grouped_linear.c for few rows per expert,
PyTorch's own product for many.

The kernel is compiled at installation where there is a C compiler; without it PyTorch's products do everything, slower.
The environment variable FAIRSEQ_MOE_CPU_KERNEL says which of its instructions run, or that it does not.

Legend: X = experts, S = slots, N = rows, K = input features, M = output features.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from fairseq_moe_ext.kernels.alignment import aligned, is_aligned

logger = logging.getLogger("fairseq_moe_ext")

VARIABLE = "FAIRSEQ_MOE_CPU_KERNEL"
CHOICES = ("auto", "avx2", "plain", "off")  # the best that the CPU has; these instructions; PyTorch's products alone
# Rows per expert up to which the kernel is faster than PyTorch's product in float32
FEW_ROWS = 48
ANY_ROWS = 2**62


@dataclass(frozen=True)
class Groups:
    """The rows of X experts; all (X,) int32, contiguous.

    sources, targets: the first row of each expert, in what is read and in what is filled. counts: how many rows.
    slots: where its weight lies. num_rows: the sum of counts.
    """

    sources: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    slots: np.ndarray
    num_rows: int

    def back(self) -> Groups:
        """From the targets to the sources."""
        return replace(self, sources=self.targets, targets=self.sources)


def grouped_linear(
    rows: Tensor, weight: Tensor, bias: Tensor, groups: Groups, outputs: Tensor, relu: bool = False
) -> None:
    """rows (N, K), weight (S, M, K), bias (S, M) -> the groups' rows of outputs (N', M), after relu or not.

    rows and outputs are contiguous. An expert's outputs depend on its rows and weight alone, bit by bit: not on where
    they lie, nor on other experts. ValueError where the shapes do not fit.
    """
    slots, features, inputs = weight.shape
    if (rows.size(1), outputs.size(1), bias.shape) != (inputs, features, (slots, features)):
        raise ValueError(
            f"rows, outputs and bias must fit the weight {tuple(weight.shape)}, got {tuple(rows.shape)}, "
            f"{tuple(outputs.shape)} and {tuple(bias.shape)}"
        )
    of_one_type = rows.dtype == weight.dtype == bias.dtype == outputs.dtype and rows.device == weight.device
    most = most_rows(rows.dtype, rows.device) if of_one_type else 0
    if most:
        run_kernel(rows, weight, bias, groups, outputs, relu, most)
    if most == ANY_ROWS:
        return
    numbers = (each.tolist() for each in (groups.sources, groups.targets, groups.counts, groups.slots))
    for source, target, count, slot in zip(*numbers, strict=True):
        if count > most:
            product = outputs[target : target + count]
            found = product if is_aligned(product) else torch.empty_like(product)
            chunk, its_weight = aligned(rows[source : source + count]), aligned(weight[slot])
            torch.addmm(bias[slot], chunk, its_weight.t(), out=found)
            if relu:
                found.relu_()
            if found is not product:
                product.copy_(found)


def most_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Rows per expert up to which the kernel runs on this machine, since it is faster than PyTorch's product."""
    if device.type != "cpu" or load_kernel() is None:
        return 0
    if dtype == torch.bfloat16 and not has_bfloat16_units():
        return ANY_ROWS  # PyTorch's product takes 2.5 times as long at any number of rows
    return FEW_ROWS if dtype == torch.float32 else 0


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 by itself (AMX or AVX512-BF16), which PyTorch's products use."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def load_kernel() -> Callable[..., None] | None:
    """The compiled kernel, as FAIRSEQ_MOE_CPU_KERNEL wants it; None where that is off, or by default not compiled.

    ValueError where the variable is none of CHOICES or asks for what this machine lacks.
    """
    return _kernel(os.environ.get(VARIABLE) or "auto")


def instructions_of_kernel() -> str:
    """What `load_kernel`'s runs on; there is one."""
    return "AVX2" if load_kernel().args[0] else "plain"


def check_kernel() -> None:
    """`load_kernel`'s errors, without its warning: where all runs on a GPU the kernel is not needed."""
    if os.environ.get(VARIABLE):
        load_kernel()


@lru_cache
def _kernel(choice: str) -> Callable[..., None] | None:
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "off":
        return None
    library = _library()
    if library is None:
        if choice != "auto":
            raise ValueError(f"{VARIABLE} {choice} needs the C kernel, which `pip install -e .` compiles")
        logger.warning("experts run slower without the C kernel for few rows, which `pip install -e .` compiles")
        return None
    if choice == "avx2" and not library.has_avx2():
        raise ValueError(f"{VARIABLE} avx2 needs a CPU with AVX2 and FMA")
    kernel, pointer, size, flag = library.grouped_linear, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    kernel.argtypes = [flag, *[pointer] * 5, size, size, *[pointer] * 3, size, size, flag, flag]
    kernel.restype = None
    return partial(kernel, choice == "avx2" or (choice == "auto" and library.has_avx2()))


def _library() -> ctypes.CDLL | None:
    """What the installation compiled; None where it did not, or did so for another version of this file."""
    spec = find_spec("fairseq_moe_ext.kernels._grouped_linear")
    library = None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
    return library if hasattr(library, "takes_slots") else None


def run_kernel(
    rows: Tensor, weight: Tensor, bias: Tensor, groups: Groups, outputs: Tensor, relu: bool, most: int
) -> None:
    """Fill `outputs` where an expert has at most `most` rows; PyTorch's threads share the experts.

    The arguments of `grouped_linear`, of one dtype, float32 or bfloat16.
    """
    kernel = load_kernel()
    weight, bias = weight.contiguous(), bias.contiguous()
    numbers = groups.sources, groups.targets, groups.counts, groups.slots

    def run(first: int, end: int) -> None:
        kernel(
            rows.data_ptr(),
            *(each.ctypes.data + first * each.itemsize for each in numbers),
            end - first,
            most,
            weight.data_ptr(),
            bias.data_ptr(),
            outputs.data_ptr(),
            weight.size(2),
            weight.size(1),
            relu,
            rows.dtype == torch.bfloat16,
        )

    parts = _shares(groups.counts, most, torch.get_num_threads())
    others = [_pool(os.getpid()).submit(run, *part) for part in parts[1:]]
    run(*parts[0])
    for other in others:
        other.result()


def _shares(counts: np.ndarray, most: int, threads: int) -> list[tuple[int, int]]:
    """At most `threads` ranges of experts, each of about as much work: a weight's reading, and a product per row; of
    those with more rows than `most` there is none.

    >>> _shares(np.array([1, 1, 50, 5, 1]), 48, 2)
    [(0, 3), (3, 5)]
    """
    if threads == 1 or len(counts) == 1:
        return [(0, len(counts))]
    work = np.where((counts > 0) & (counts <= most), 8 + counts, 0).cumsum()
    bounds = np.searchsorted(work, work[-1] * np.arange(1, threads) / threads, side="right").tolist()
    edges = sorted({0, *bounds, len(counts)})
    return list(zip(edges, edges[1:], strict=False))


@lru_cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Of one process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(thread_name_prefix="experts")
