"""One linear layer per expert on rows in expert order, on a CPU: the C kernel of grouped_linear.c for few rows per
expert, PyTorch's own product for many.

The kernel is compiled at installation where there is a C compiler; without it PyTorch's products do everything, slower.
The environment variable FAIRSEQ_MOE_CPU_KERNEL says which of its instructions run, or that it does not.

Legend: H = experts, N = rows in expert order, K = input features, M = output features.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger("fairseq_moe_ext")

VARIABLE = "FAIRSEQ_MOE_CPU_KERNEL"
CHOICES = ("auto", "avx2", "plain", "off")  # the best that the CPU has; these instructions; PyTorch's products alone
ALIGNMENT = 64  # bytes, at which PyTorch's CPU tensors begin
# Rows per expert up to which the kernel is faster than PyTorch's product in float32
FEW_ROWS = 48
ANY_ROWS = 2**62


def grouped_linear(
    rows: Tensor, rows_per_expert: Sequence[int], weight: Tensor, bias: Tensor, relu: bool = False
) -> Tensor:
    """rows (N, K) in expert order, H counts that sum to N, weight (H, M, K), bias (H, M) -> (N, M), after relu or not.

    An expert's outputs depend on its rows and weights alone, bit by bit: not on where they lie, nor on other experts.
    """
    experts, outputs, inputs = weight.shape
    wanted = ((sum(rows_per_expert), inputs), (experts, outputs), (len(rows_per_expert), outputs))
    if (rows.shape, bias.shape, bias.shape) != wanted:
        raise ValueError(
            f"rows, bias and rows_per_expert must fit the weight {tuple(weight.shape)}, got {tuple(rows.shape)}, "
            f"{tuple(bias.shape)} and {len(rows_per_expert)} counts that sum to {sum(rows_per_expert)}"
        )
    output = rows.new_empty(rows.size(0), outputs)
    of_one_type = rows.dtype == weight.dtype == bias.dtype and rows.device == weight.device
    most = most_rows(rows.dtype, rows.device) if of_one_type else 0
    if most:
        run_kernel(rows.contiguous(), list(rows_per_expert), weight, bias, output, relu, most)
    first = 0
    for expert, count in enumerate(rows_per_expert):
        if count > most:
            product = output[first : first + count]
            found = product if _is_aligned(product) else torch.empty_like(product)
            weight_there, chunk = aligned(weight[expert]), aligned(rows[first : first + count])
            torch.addmm(bias[expert], chunk, weight_there.t(), out=found)
            if relu:
                found.relu_()
            if found is not product:
                product.copy_(found)
        first += count
    return output


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
    kernel.argtypes = [flag, pointer, pointer, size, size, pointer, pointer, pointer, size, size, flag, flag]
    kernel.restype = None
    return partial(kernel, choice == "avx2" or (choice == "auto" and library.has_avx2()))


def _library() -> ctypes.CDLL | None:
    """What the installation compiled; None where it did not, or did so for another version of this file."""
    spec = find_spec("fairseq_moe_ext.kernels._grouped_linear")
    library = None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
    return library if hasattr(library, "has_avx2") else None


def run_kernel(
    rows: Tensor, counts: list[int], weight: Tensor, bias: Tensor, output: Tensor, relu: bool, most: int
) -> None:
    """Fill `output` where an expert has at most `most` rows; PyTorch's threads share the experts.

    The arguments of `grouped_linear`, of one dtype, float32 or bfloat16; `rows` and `output` contiguous.
    """
    kernel, size = load_kernel(), rows.element_size()
    weight, bias = weight.contiguous(), bias.contiguous()
    _, outputs, inputs = weight.shape
    numbers = (ctypes.c_int64 * len(counts))(*counts)

    def run(first: int, end: int, row: int) -> None:
        kernel(
            rows.data_ptr() + row * inputs * size,
            ctypes.addressof(numbers) + first * ctypes.sizeof(ctypes.c_int64),
            end - first,
            most,
            weight.data_ptr() + first * outputs * inputs * size,
            bias.data_ptr() + first * outputs * size,
            output.data_ptr() + row * outputs * size,
            inputs,
            outputs,
            relu,
            rows.dtype == torch.bfloat16,
        )

    parts = _shares([count if count <= most else 0 for count in counts], torch.get_num_threads())
    starts = [sum(counts[:first]) for first, _ in parts]
    others = [_pool(os.getpid()).submit(run, *part, row) for part, row in zip(parts[1:], starts[1:], strict=True)]
    run(*parts[0], starts[0])
    for other in others:
        other.result()


def _shares(counts: list[int], threads: int) -> list[tuple[int, int]]:
    """At most `threads` ranges of experts, each of about as much work: a weight's reading, and a product per row.

    >>> _shares([1, 1, 0, 5, 1], 2)
    [(0, 3), (3, 5)]
    """
    if threads == 1 or len(counts) == 1:
        return [(0, len(counts))]
    work = torch.tensor([8 * (count > 0) + count for count in counts]).cumsum(0)
    bounds = torch.searchsorted(work, work[-1] * torch.arange(1, threads) / threads, right=True).tolist()
    edges = sorted({0, *bounds, len(counts)})
    return list(zip(edges, edges[1:], strict=False))


@lru_cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Of one process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(thread_name_prefix="experts")


def aligned(values: Tensor) -> Tensor:
    """`values`, or a copy of them: libraries round differently by where a tensor begins, and the same expert may lie in
    any place of a packed parameter, its rows anywhere among the others'. Only odd dims are copied."""
    return values if _is_aligned(values) else values.clone()


def _is_aligned(matrix: Tensor) -> bool:
    return matrix.data_ptr() % ALIGNMENT == 0
