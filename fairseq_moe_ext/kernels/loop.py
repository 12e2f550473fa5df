"""Experts one by one, on any device: on a CPU few rows of many experts go to the C kernel together.

Legend: N = rows, E = experts, S = slots, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation, activate_rows
from fairseq_moe_ext.kernels.grouped_linear import Groups, grouped_linear
from fairseq_moe_ext.kernels.offsets import Offsets

ROWS_AT_ONCE = 512  # of hidden features at a time


def run_loop(
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: Sequence[Tensor],
    activation: Activation,
    outputs: Tensor,
) -> None:
    """grouped_mlp.py's signature."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = pool
    is_relu = activation in (F.relu, torch.relu)
    rows = rows.contiguous()
    for groups in _groups(offsets.on_host, slots):
        hidden = rows.new_empty(groups.num_rows, fc1_weight.size(1))
        grouped_linear(rows, fc1_weight, fc1_bias, groups, hidden, is_relu)
        if not is_relu:
            hidden = activate_rows(hidden, activation)
        grouped_linear(hidden, fc2_weight, fc2_bias, groups.back(), outputs)


def _groups(offsets: Tensor, slots: Tensor | None) -> Iterator[Groups]:
    """The experts, some at a time: more rows together would only take more memory, and leave the cache between the two
    layers. Those without a slot have no rows here. By NumPy, which is faster than PyTorch on so few numbers."""
    bounds = offsets.numpy()
    starts, counts = bounds[:-1], bounds[1:] - bounds[:-1]
    if slots is None:
        slot_ids = np.arange(len(counts), dtype=np.int32)
    else:
        slot_ids = slots.numpy()
        counts = counts * (slot_ids >= 0)
    ends = counts.cumsum(dtype=np.int32)
    first = before = 0
    for end in _spans(counts.tolist()):
        part, last = slice(first, end), int(ends[end - 1])
        targets = ends[part] - counts[part] - np.int32(before)
        yield Groups(starts[part], targets, counts[part], slot_ids[part], last - before)
        first, before = end, last


def _spans(counts: Sequence[int]) -> Iterator[int]:
    """Where each of the parts ends that together are all experts.

    >>> list(_spans([500, 12, 1, 1]))
    [2, 4]
    """
    rows = 0
    for expert, count in enumerate(counts):
        rows += count
        if rows >= ROWS_AT_ONCE or expert == len(counts) - 1:
            yield expert + 1
            rows = 0
