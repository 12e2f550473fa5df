"""What `torch.autocast` (fairseq's `--amp`) makes of a layer: its products run in a lower precision, as a dense
layer's do, whose weights stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(values: Tensor) -> torch.dtype | None:
    """The dtype of products with `values` under autocast; None without it, and for float64, which it leaves alone."""
    device = values.device.type
    if values.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(values: Tensor) -> AbstractContextManager:
    """Within it `values` are computed with as they are."""
    return nullcontext() if autocast_dtype(values) is None else torch.autocast(values.device.type, enabled=False)
