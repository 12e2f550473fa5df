"""Up to how many rows per expert the C kernel computes, and PyTorch's product beyond.

The numbers are measured by scripts/benchmarks/measure_crossing.py, never while a model is served: which of the two
computes an expert does not depend on the machine's mood, and a run's bits can be repeated.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS, load_kernel
from fairseq_moe_ext.kernels.cpu_kernel import VARIABLE as KERNEL_VARIABLE

VARIABLE = "FAIRSEQ_MOE_CPU_ROWS"
CHOICES = ("auto", "any")  # by the table; the C kernel at any number of rows

# instructions -> dtype -> rows; plain's and avx512's are those of an earlier kernel, yet to be measured with this one
TABLE = {
    "plain": {torch.float32: 48, torch.bfloat16: 48, torch.float16: 48},
    "avx2": {torch.float32: 96, torch.bfloat16: ANY_ROWS, torch.float16: ANY_ROWS},
    "avx512": {torch.float32: 48, torch.bfloat16: ANY_ROWS, torch.float16: ANY_ROWS},
}
UNITS_ROWS = 2  # of a dtype that the CPU multiplies by itself, for PyTorch's products use that


def most_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Rows per expert up to which the C kernel runs on this machine; 0: it does not.

    ValueError where FAIRSEQ_MOE_CPU_ROWS is none of CHOICES.
    """
    kernel = load_kernel() if device.type == "cpu" else None
    choice = _choice()
    if kernel is None or dtype not in TABLE[kernel.instructions]:
        return 0
    if choice == "any":
        return ANY_ROWS
    return UNITS_ROWS if has_units(dtype) else TABLE[kernel.instructions][dtype]


def check_rows() -> None:
    """ValueError where FAIRSEQ_MOE_CPU_ROWS is none of CHOICES, or asks for a kernel that does not run."""
    if _choice() == "any" and load_kernel() is None:
        raise ValueError(f"{VARIABLE} any needs the C kernel, which is not compiled or turned off by {KERNEL_VARIABLE}")


def _choice() -> str:
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


@lru_cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a dtype of 16 bits by itself (AMX, AVX512-BF16, AVX512-FP16)."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if dtype == torch.float16 and hasattr(torch.cpu, "get_capabilities"):  # older PyTorch does not say
        found = torch.cpu.get_capabilities()
        return found.get("avx512_fp16", False) or found.get("amx_fp16", False)
    return False
