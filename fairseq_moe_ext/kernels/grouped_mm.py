"""Experts by PyTorch's own grouped product. Legend: N = rows, E = experts, S = slots, D = model dim, F = hidden dim."""

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
    """grouped_mlp.py's signature. With slots, which the product does not know, rows are put in their order, for which
    the host must know the offsets."""
    if slots is None:
        outputs.copy_(_products(rows, offsets.on_device[1:], pool, activation))
        return
    row_ids, ends = (numbers.to(rows.device) for numbers in _by_slot(offsets.on_host, slots, pool[0].size(0)))
    if row_ids.numel():
        outputs.index_copy_(0, row_ids, _products(rows.index_select(0, row_ids), ends, pool, activation))


def _by_slot(offsets: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """offsets (E + 1,), slots (E,) -> the rows of experts with a slot, (N',) int64, slot by slot, and where those of
    each slot end, (S,) int32.

    >>> _by_slot(torch.tensor([0, 2, 3, 5]), torch.tensor([2, -1, 0]), 3)
    (tensor([3, 4, 0, 1]), tensor([2, 2, 4], dtype=torch.int32))
    """
    counts, starts, slots = torch.zeros(num_slots, dtype=torch.int64), offsets[:-1].long(), slots.long()
    order = slots.argsort()[(slots < 0).sum() :]
    its_counts = offsets.diff().long()[order]
    counts[slots[order]] = its_counts
    ends = counts.cumsum(0)
    first = starts[order] - (its_counts.cumsum(0) - its_counts)  # what to add to a row's new place
    return torch.arange(int(its_counts.sum())) + first.repeat_interleave(its_counts), ends.int()


def _products(rows: Tensor, ends: Tensor, pool: Sequence[Tensor], activation: Activation) -> Tensor:
    """rows (N, D) in the order of the S experts of the pool, ends (S,) int32 -> (N, D)."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = pool
    num_experts = fc1_weight.size(0)
    positions = torch.arange(rows.size(0), device=rows.device, dtype=ends.dtype)
    owners = torch.searchsorted(ends, positions, right=True).clamp_(max=num_experts - 1)  # (N,) the expert of each row
    hidden = F.grouped_mm(rows, fc1_weight.transpose(1, 2), offs=ends)
    hidden = activate_rows(hidden + fc1_bias.index_select(0, owners), activation)
    return F.grouped_mm(hidden, fc2_weight.transpose(1, 2), offs=ends) + fc2_bias.index_select(0, owners)
