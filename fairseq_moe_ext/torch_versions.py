"""What older PyTorch and Triton lack or name otherwise, asked in one place; setup.py names the oldest served."""

from __future__ import annotations

import os

import torch.nn.functional as F


def has_grouped_mm() -> bool:
    return hasattr(F, "grouped_mm")  # PyTorch 2.8 has none


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run under its interpreter (TRITON_INTERPRET=1), on any device; imports triton."""
    import triton

    if hasattr(triton, "knobs"):
        return triton.knobs.runtime.interpret
    return os.environ.get("TRITON_INTERPRET") == "1"  # Triton 3.3
