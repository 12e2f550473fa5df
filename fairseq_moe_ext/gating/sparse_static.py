"""Static gating with indices in place of the dense mask: the same slots, the same padding, no (T, E, C) tensor.

How Tutel dispatches, and what the paper on dynamic gating compares with; for measurements, since nothing is gained by
it that dynamic gating does not give. Source: Tutel (2206.03382), sparse encoding and decoding.

Legend: T = tokens, E = experts, K = choices per token, C = slots per expert, D = model dim.
"""

from __future__ import annotations

from torch import Tensor

from fairseq_moe_ext.gating.routing import Routing


def slot_rows(routing: Routing, slots: Tensor, capacity: int) -> Tensor:
    """(T, K) int64: the row of every assignment among the experts' slots (E * C); -1 where it is not kept."""
    return (routing.expert_ids * capacity + slots).masked_fill(~routing.kept, -1)


def sparse_dispatch(tokens: Tensor, routing: Routing, rows: Tensor, capacity: int) -> Tensor:
    """tokens (T, D), rows of `slot_rows` -> every expert's slots (E * C, D), empty ones zero."""
    token_ids, _ = routing.kept.nonzero(as_tuple=True)
    filled = tokens.new_zeros(routing.num_experts * capacity, tokens.size(1))
    return filled.index_copy_(0, rows[routing.kept], tokens.index_select(0, token_ids))
