"""Experts one by one, on any device: on a CPU few rows of many experts go to the C kernel together.

Legend: N = rows, E = experts, S = slots, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation, activate_rows
from fairseq_moe_ext.kernels.alignment import aligned, is_aligned
from fairseq_moe_ext.kernels.cpu_kernel import ACTIVATIONS, Groups, Linear, load_kernel
from fairseq_moe_ext.kernels.crossing import most_rows
from fairseq_moe_ext.kernels.offsets import Offsets

ROWS_AT_ONCE = 512  # of hidden features at a time


def run_loop(
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: Sequence[Tensor],
    activation: Activation,
    outputs: Tensor,
    row_ids: Tensor | None = None,
    most: int | None = None,
) -> None:
    """grouped_mlp.py's signature.

    most: rows per expert up to which the C kernel computes; None: as crossing.py says.
    """
    groups = groups_of(offsets, slots, row_ids)
    rows = rows.contiguous()
    most = most_rows(rows.dtype, rows.device) if most is None else most
    if most:
        kernel, pool = load_kernel(), [part.contiguous() for part in pool]
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = pool
        if activation in ACTIVATIONS:
            layers = Linear(fc1_weight, fc1_bias, activation), Linear(fc2_weight, fc2_bias)
            kernel.run(rows, layers, groups, outputs, most)
        else:
            fc1, fc2 = [Linear(fc1_weight, fc1_bias)], [Linear(fc2_weight, fc2_bias)]
            run_in_two(
                groups.up_to(most),
                rows.new_empty(0, fc1_weight.size(1)),
                activation,
                lambda its, hidden: kernel.run(rows, fc1, its, hidden),
                lambda its, hidden: kernel.run(hidden, fc2, its, outputs),
            )
    if outputs.size(0) > most and groups.counts.max() > most:
        _run_products(rows, groups, pool, activation, outputs, most)


def groups_of(offsets: Offsets, slots: Tensor | None, row_ids: Tensor | None = None) -> Groups:
    """The experts' rows, none of those without a slot. By NumPy, which is faster than PyTorch on so few numbers."""
    bounds = offsets.on_host.numpy()
    starts, counts = bounds[:-1], bounds[1:] - bounds[:-1]
    if slots is None:
        return Groups(starts, starts, counts, np.arange(len(counts)), row_ids)
    slot_ids = slots.numpy()
    return Groups(starts, starts, counts * (slot_ids >= 0), slot_ids, row_ids)


def run_in_two(
    groups: Groups,
    none: Tensor,
    activation: Activation,
    fc1: Callable[[Groups, Tensor], None],
    fc2: Callable[[Groups, Tensor], None],
) -> None:
    """Two calls of the C kernel with an activation of PyTorch's between them; some experts at a time: more rows
    together would only take more memory, and leave the cache between the two layers.

    none (0, F) has the dtype of the hidden features. fc1 fills them from the rows, fc2 takes them to the outputs.
    """
    counts = groups.counts
    first = 0
    for end in _spans(counts.tolist()):
        sources, targets, its, slots = groups.numbers[:, first:end]
        between = its.cumsum() - its
        hidden = none.new_empty(int(its.sum()), none.size(1))
        fc1(Groups(sources, between, its, slots, groups.row_ids), hidden)
        fc2(Groups(between, targets, its, slots), activate_rows(hidden, activation))
        first = end


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


def _run_products(
    rows: Tensor, groups: Groups, pool: Sequence[Tensor], activation: Activation, outputs: Tensor, most: int
) -> None:
    """By PyTorch's products, the experts that have more than `most` rows."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = pool
    for expert in np.flatnonzero(groups.counts > most).tolist():
        source, target, count, slot = groups.numbers[:, expert].tolist()
        hidden = rows.new_empty(count, fc1_weight.size(1))
        its = slice(source, source + count)
        chosen = rows[its] if groups.row_ids is None else rows.index_select(0, groups.row_ids[its])
        _product(chosen, fc1_weight[slot], fc1_bias[slot], hidden)
        hidden = hidden.relu_() if activation in (F.relu, torch.relu) else activate_rows(hidden, activation)
        _product(hidden, fc2_weight[slot], fc2_bias[slot], outputs[target : target + count])


def _product(rows: Tensor, weight: Tensor, bias: Tensor, outputs: Tensor) -> None:
    """rows (n, K), weight (M, K), bias (M,) -> outputs (n, M), with the bits of tensors that begin as PyTorch's do."""
    found = outputs if is_aligned(outputs) else torch.empty_like(outputs)
    torch.addmm(bias, aligned(rows), aligned(weight).t(), out=found)
    if found is not outputs:
        outputs.copy_(found)
