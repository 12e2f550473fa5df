"""Which kernel computes experts: what the device can do, and what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from fairseq_moe_ext.kernels.grouped_mm import ROW_BYTES, fits_grouped_mm
from fairseq_moe_ext.torch_versions import has_grouped_mm, triton_is_interpreted

logger = logging.getLogger("fairseq_moe_ext")

KERNELS = ("auto", "triton", "grouped-mm", "loop")
AMPERE = (8, 0)  # the oldest compute capability with bfloat16, and the oldest that Triton supports


@dataclass(frozen=True)
class Hardware:
    """capability: a GPU's compute capability, None for any other device. triton: whether Triton compiles for it."""

    capability: tuple[int, int] | None
    triton: bool


def choose_kernel(wanted: str, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> str:
    """`triton`, `grouped-mm` or `loop` for rows of `dtype` on `device`, as `wanted` (KERNELS) says or fits best.

    dims: F and D. ValueError where a kernel that was asked for cannot run.
    """
    if wanted == "auto":
        return best_kernel(hardware_of(device), dtype, dims)
    if wanted == "grouped-mm" and not has_grouped_mm():
        raise ValueError(
            f"kernel grouped-mm needs torch.nn.functional.grouped_mm, which PyTorch {torch.__version__} does not have"
        )
    if wanted == "grouped-mm" and not fits_grouped_mm(dtype, dims):
        raise ValueError(
            f"kernel grouped-mm needs dims whose rows are multiples of {ROW_BYTES} bytes, got model dim {dims[1]} and "
            f"hidden dim {dims[0]} in {dtype}"
        )
    if wanted == "triton" and find_spec("triton") is None:
        raise ValueError("kernel triton needs the package triton, which is not installed")
    if wanted == "triton" and device.type != "cuda" and not triton_is_interpreted():
        raise ValueError(f"kernel triton needs a GPU, got tokens on {device}")
    return wanted


def best_kernel(hardware: Hardware, dtype: torch.dtype, dims: Sequence[int]) -> str:
    """What runs on that hardware without waiting for the host, or else `loop`; dims: F and D.

    >>> best_kernel(Hardware((7, 0), True), torch.float16, (8192, 2048))
    'loop'
    """
    if hardware.capability is None or hardware.capability < AMPERE:
        return "loop"
    if hardware.triton and dtype in (torch.float16, torch.bfloat16, torch.float32):
        return "triton"
    if dtype == torch.bfloat16 and fits_grouped_mm(dtype, dims):  # in other dtypes it reads the offsets on the host
        return "grouped-mm"
    return "loop"


@lru_cache
def hardware_of(device: torch.device) -> Hardware:
    """What `device` can do; Triton is tried, since it needs a C compiler as well."""
    if device.type != "cuda":
        return Hardware(None, False)
    capability = torch.cuda.get_device_capability(device)
    if find_spec("triton") is None or capability < AMPERE:
        return Hardware(capability, False)
    from fairseq_moe_ext.kernels.triton_mlp import weighted_sum

    try:
        row_ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        weighted_sum(torch.ones(1, 16, device=device), row_ids, torch.ones(1, 1, device=device))
    except Exception as error:  # whatever a missing compiler or driver makes of it
        logger.warning("Triton does not work on %s, experts run without it: %s", device, error)
        return Hardware(capability, False)
    return Hardware(capability, True)
