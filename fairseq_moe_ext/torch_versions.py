"""What older PyTorch and Triton lack or name otherwise, asked in one place; setup.py names the oldest served."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

# whether `torch.load(map_location="meta")` says where in its file a storage lies
_META_HAS_OFFSETS = torch.__version__ >= "2.11"


def has_grouped_mm() -> bool:
    """Whether this PyTorch has `torch.nn.functional.grouped_mm`."""
    return hasattr(F, "grouped_mm")  # PyTorch 2.8 has none


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run under its interpreter (TRITON_INTERPRET=1), on any device; imports triton."""
    import triton

    if hasattr(triton, "knobs"):
        return triton.knobs.runtime.interpret
    return os.environ.get("TRITON_INTERPRET") == "1"  # Triton 3.3


def loading_offsets() -> AbstractContextManager:
    """Within it `torch.load(map_location="meta")` says where in its file every tensor's storage lies, and how long."""
    if _META_HAS_OFFSETS:
        return nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def storage_place(meta: Tensor) -> tuple[int, int]:
    """(offset in its file, bytes) of the storage of a tensor that was loaded so."""
    if meta.layout != torch.strided:
        return 0, 0  # it has none
    storage = meta.untyped_storage()
    # older PyTorch multiplies by the values' size twice
    return storage._checkpoint_offset, storage.nbytes() // (1 if _META_HAS_OFFSETS else meta.element_size())
