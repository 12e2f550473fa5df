"""Static gating with indices in place of the dense mask: the same slots, the same padding, no (T, E, C) tensor.

How Tutel dispatches, and what the paper on dynamic gating compares with; for measurements, since nothing is gained by
it that dynamic gating does not give. Source: Tutel (2206.03382), sparse encoding and decoding.

Legend: T = tokens, E = experts, K = choices per token, C = slots per expert, D = model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_ext.gating.routing import Routing


def slot_rows(routing: Routing, slots: Tensor, capacity: int) -> Tensor:
    """(T, K) int64: the row of every assignment among the experts' slots (E * C); 0 where it is not kept."""
    return (routing.expert_ids * capacity + slots) * routing.kept


def sparse_dispatch(tokens: Tensor, routing: Routing, rows: Tensor, capacity: int) -> Tensor:
    """tokens (T, D), rows of `slot_rows` -> every expert's slots (E * C, D), empty ones zero."""
    token_ids, _ = routing.kept.nonzero(as_tuple=True)
    filled = tokens.new_zeros(routing.num_experts * capacity, tokens.size(1))
    return filled.index_copy_(0, rows[routing.kept], tokens.index_select(0, token_ids))


def sparse_combine(outputs: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """outputs (E * C, D), rows (T, K), weights (T, K), zero where an assignment is not kept -> (T, D)."""
    if outputs.size(0) == 0:  # no tokens, hence no slots
        return outputs
    chosen = outputs.index_select(0, rows.view(-1)).view(*rows.shape, outputs.size(1))
    chosen = chosen.masked_fill(weights.unsqueeze(2) == 0, 0)  # what is not kept points at another token's row
    return torch.einsum("tk,tkd->td", weights, chosen)
