"""Experts by PyTorch's own grouped product. Legend: N = rows, E = experts, D = model dim, F = hidden dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation, activate_rows
from fairseq_moe_ext.kernels.offsets import Offsets
from fairseq_moe_ext.torch_versions import has_grouped_mm

ROW_BYTES = 16  # of which every row of a weight is a multiple


def fits_grouped_mm(dtype: torch.dtype, dims: Sequence[int]) -> bool:
    """dims: F and D."""
    return has_grouped_mm() and all(dim * dtype.itemsize % ROW_BYTES == 0 for dim in dims)


def run_grouped_mm(
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: Sequence[Tensor],
    activation: Activation,
    outputs: Tensor,
) -> None:
    """grouped_mlp.py's signature; ValueError for slots, through which the product cannot reach."""
    if slots is not None:
        raise ValueError("kernel grouped-mm must have every expert in its own slot")
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = pool
    ends, num_experts = offsets.on_device[1:], fc1_weight.size(0)
    positions = torch.arange(rows.size(0), device=rows.device, dtype=ends.dtype)
    owners = torch.searchsorted(ends, positions, right=True).clamp_(max=num_experts - 1)  # (N,) the expert of each row
    hidden = F.grouped_mm(rows, fc1_weight.transpose(1, 2), offs=ends)
    hidden = activate_rows(hidden + fc1_bias.index_select(0, owners), activation)
    outputs.copy_(F.grouped_mm(hidden, fc2_weight.transpose(1, 2), offs=ends) + fc2_bias.index_select(0, owners))
