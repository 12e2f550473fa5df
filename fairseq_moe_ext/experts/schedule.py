"""In what order a layer's experts are computed, and where they lie when their step comes.

Legend: N = rows, H = local experts, S = slots of the pool, D = model dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.grouped_mlp import Pool, grouped_mlp, reads_row_ids
from fairseq_moe_ext.kernels.offsets import Offsets


@dataclass(frozen=True)
class Step:
    """Experts that are computed together: those from `first` to before `end`, by their index.

    slots: of each of them, negative for one that is not in this step. None: every expert lies in the slot of its index.
    """

    first: int
    end: int
    slots: Sequence[int] | None = None


class Schedule(Protocol):
    """The steps of a layer's calls; every expert that has rows is in one step of a call."""

    def steps(self, rows_per_expert: Sequence[int]) -> Iterable[Step]:
        """Of a call with these H counts. A step comes once its experts lie in their slots, where they stay until the
        next one is asked for."""


class AllResident:
    """Every expert in the slot of its index: one step, for which nobody needs the counts."""

    def steps(self, rows_per_expert: Sequence[int]) -> Iterable[Step]:
        """As `Schedule` has it."""
        return (Step(0, len(rows_per_expert)),)


def run_steps(
    steps: Iterable[Step],
    kernel: str,
    rows: Tensor,
    offsets: Offsets,
    pool: Pool,
    activation: Activation,
    row_ids: Tensor | None = None,
) -> Tensor:
    """rows (N, D) in the order of the H experts, or those of the numbers row_ids (N,) -> outputs (N, D).

    No gradients. kernel, pool: grouped_mlp.py.
    """
    if row_ids is not None and not reads_row_ids(kernel, rows):
        rows, row_ids = rows.index_select(0, row_ids), None
    outputs = rows.new_empty(rows.size(0) if row_ids is None else row_ids.size(0), rows.size(1))
    for step in steps:
        slots = None
        if step.slots is not None:
            slots = torch.tensor(step.slots, dtype=torch.int32)
        part = offsets.part(step.first, step.end)
        grouped_mlp(kernel, rows, part, slots, pool, activation, outputs, row_ids)
    return outputs
