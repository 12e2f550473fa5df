"""Where every assignment's row goes, and back.

Paper: "Toward Efficient Inference for Mixture of Experts", section on dynamic gating: flatten, sort by expert id,
count, gather by index; the inverse index takes the place of the mask product on the way back.

Legend: T = tokens, E = experts, K = choices per token, N = rows, D = model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fairseq_moe_ext.gating.routing import Routing
from fairseq_moe_ext.kernels.offsets import DeviceCounts, Offsets
from fairseq_moe_ext.kernels.sorting import sort_assignments


@dataclass(frozen=True)
class Plan:
    """The assignments of T tokens in expert order.

    routing: whose they are, with nothing more to be dropped. weights: (T, K) of the outputs' sum, zero where not kept.
    assignments: (N,) int64, N = T * K, which assignment (token * K + choice) each row is; within an expert in rising
    order. Those that are not kept come last, so that the host need not know how many are.
    row_ids: (T, K) int64, the row of each assignment; -1 where it is not kept.
    offsets: where each expert's rows begin; the last is where those of the last end.
    """

    routing: Routing
    weights: Tensor
    assignments: Tensor
    row_ids: Tensor
    offsets: Offsets

    @property
    def token_ids(self) -> Tensor:
        """(N,) int64, the token of each row."""
        num_choices = self.weights.size(1)
        return self.assignments if num_choices == 1 else self.assignments // num_choices

    @cached_property
    def load(self) -> Sequence[int]:
        """E tokens per expert, which lie on the device until they are read."""
        return DeviceCounts(self.offsets)


def plan_by_expert(routing: Routing, weights: Tensor, targets: Tensor | None = None, num_targets: int = 0) -> Plan:
    """Sort the assignments by expert; the host learns nothing of it.

    targets: (T, K) int64 below num_targets, what the rows are sorted by in place of the expert.
    """
    if targets is None:
        targets, num_targets = routing.expert_ids, routing.num_experts
    assignments, offsets, row_ids = sort_assignments(targets, routing.kept, num_targets)
    return Plan(routing, weights, assignments, row_ids.view_as(weights), Offsets(offsets))
