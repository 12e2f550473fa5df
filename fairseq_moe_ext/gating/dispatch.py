"""Dynamic gating's dispatch and combine: tokens sorted by expert, nothing padded, nothing dropped.

Paper: "Toward Efficient Inference for Mixture of Experts", section on dynamic gating: flatten, sort by expert id,
count, gather by index; the inverse index takes the place of the mask product on the way back.

Legend: T = tokens, E = experts, K = choices per token, N = kept assignments, D = model dim. Under several ranks copies
of experts, in the order of the ranks that hold them, stand for the experts here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_moe_ext.gating.copies import ExpertCopies
from fairseq_moe_ext.gating.routing import Routing


@dataclass(frozen=True)
class DispatchPlan:
    """The way back of one dispatch.

    assignments: (N,) int64, which of the T*K assignments (token * K + choice) each row is, in rising expert id.
    token_ids: (N,) int64, the token of each row.
    tokens_per_expert: E counts that sum to N.
    num_tokens: T.
    """

    assignments: Tensor
    token_ids: Tensor
    tokens_per_expert: list[int]
    num_tokens: int


def plan_dispatch(
    routing: Routing, copies: ExpertCopies | None = None, send_sizes: Callable[[Tensor], None] | None = None
) -> DispatchPlan:
    """Sort the kept assignments by expert; assignments that are not kept go to a sentinel expert past the last.

    copies: where the experts lie, under several ranks. send_sizes: called with the counts (E,) before the sorting.
    """
    num_tokens, num_choices = routing.expert_ids.shape
    expert_ids, num_experts = routing.expert_ids, routing.num_experts
    if copies is not None:
        expert_ids, num_experts = copies.choose(expert_ids, routing.kept), copies.num_copies
    expert_ids = expert_ids.masked_fill(~routing.kept, num_experts).view(-1)  # (T * K,)
    sizes = torch.bincount(expert_ids, minlength=num_experts + 1)[:num_experts]
    if send_sizes is not None:
        send_sizes(sizes)
    counts = sizes.tolist()
    # stable, so that a token's rows in an expert keep the tokens' order: results do not depend on the sort
    assignments = expert_ids.argsort(stable=True)[: sum(counts)]
    token_ids = torch.div(assignments, num_choices, rounding_mode="floor") if num_choices > 1 else assignments
    return DispatchPlan(assignments, token_ids, counts, num_tokens)


def dispatch(tokens: Tensor, plan: DispatchPlan) -> Tensor:
    """tokens (T, D) -> rows (N, D) in expert order."""
    return tokens.index_select(0, plan.token_ids)


def combine(outputs: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """outputs (N, D) in expert order, weights (T, K) -> their weighted sum per token (T, D), zero without experts."""
    row_weights = weights.reshape(-1).index_select(0, plan.assignments)  # (N,)
    result = outputs.new_zeros(plan.num_tokens, outputs.size(1))
    return result.index_add(0, plan.token_ids, outputs * row_weights.unsqueeze(1))


def run_by_expert(experts: nn.Module, rows: list[Tensor], counts: list[list[int]]) -> tuple[Tensor, ...]:
    """Run every expert once on its rows of all sources.

    rows: per source (n, D) in expert order; counts: per source H rows per expert -> per source its outputs (n, D).
    """
    if len(rows) == 1:
        return (experts(rows[0], counts[0]),)
    lengths = torch.tensor(counts)  # (sources, H)
    starts = (lengths.view(-1).cumsum(0) - lengths.view(-1)).view_as(lengths)
    by_expert, starts = lengths.t().reshape(-1), starts.t().reshape(-1)
    shift = starts - (by_expert.cumsum(0) - by_expert)
    joined = torch.cat(rows)
    order = torch.repeat_interleave(shift, by_expert) + torch.arange(joined.size(0))
    order = order.to(joined.device)
    outputs = experts(joined.index_select(0, order), lengths.sum(0).tolist())
    return torch.empty_like(outputs).index_copy_(0, order, outputs).split(lengths.sum(1).tolist())
