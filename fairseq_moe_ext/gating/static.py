"""Static gating, upstream's: a capacity per expert, a dense mask of placeholders, every expert on every slot.

The baseline of every comparison, and what reproduces published figures to the last drop. It is written as upstream
writes it (`modules/moe/top2gate.py`, `moe_layer.py`), neither slowed nor helped.

Legend: T = tokens, E = experts, K = choices per token, C = slots per expert, D = model dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq_moe_ext.gating.routing import Routing


def static_capacity(num_tokens: int, num_experts: int, num_choices: int, fraction: float, training: bool) -> int:
    """Slots per expert: `ceil(fraction * T)` in evaluation with a fraction above 0, else `K * ceil(T / E)`.

    The product is upstream's, in floating point, and so are its slots: 8 for 0.07 of 100 tokens.

    >>> static_capacity(100, 4, 2, 0.07, training=False)
    8
    >>> static_capacity(1024, 8, 2, 0.25, training=False), static_capacity(1024, 8, 2, 0.25, training=True)
    (256, 256)
    """
    if fraction > 0 and not training:
        return math.ceil(fraction * num_tokens)
    return num_choices * math.ceil(num_tokens / num_experts)


def assign_slots(routing: Routing, batch_prioritized: bool = False) -> Tensor:
    """(T, K) int64: the slot of every assignment in its expert, counted from 0, whether or not it exists.

    Tokens queue in the order they come, or, batch-prioritised, by falling highest probability; second choices queue
    after the first choices of the whole batch. Entries of assignments that are not kept have no meaning.
    """
    order = None
    if batch_prioritized:
        order = (-routing.probabilities.max(dim=1).values).argsort(dim=0, stable=True)
    slots, taken = [], 0
    for k in range(routing.expert_ids.size(1)):
        expert_ids = routing.expert_ids[:, k : k + 1]
        mask = _one_hot(expert_ids.squeeze(1), routing.num_experts) * routing.kept[:, k : k + 1]  # (T, E)
        if order is None:
            queue = mask.cumsum(dim=0) - 1
        else:
            queue = torch.empty_like(mask)
            queue[order] = mask[order].cumsum(dim=0) - 1
        slots.append((queue + taken).gather(1, expert_ids))
        taken = taken + mask.sum(dim=0, keepdim=True)
    return torch.cat(slots, dim=1)


def _one_hot(numbers: Tensor, count: int) -> Tensor:
    """numbers (T,) -> (T, count) int64; T and count may be 0, which torch's own refuses."""
    return numbers.new_zeros(numbers.size(0), count).scatter_(1, numbers.unsqueeze(1), 1)


def dense_combine_weights(routing: Routing, slots: Tensor, weights: Tensor, capacity: int) -> Tensor:
    """(T, E, C) combine weights, zero but where a token's assignment lies in an expert's slot.

    `weights` is (T, K), zero where an assignment is not kept.
    """
    dense = None
    for k in range(weights.size(1)):
        expert = _one_hot(routing.expert_ids[:, k], routing.num_experts).to(weights.dtype)  # (T, E)
        slot = _one_hot(slots[:, k] * routing.kept[:, k], capacity).to(weights.dtype)  # (T, C)
        one = torch.bmm((expert * weights[:, k : k + 1]).unsqueeze(2), slot.unsqueeze(1))  # (T, E, C)
        dense = one if dense is None else dense + one
    return dense


def static_dispatch(tokens: Tensor, combine_weights: Tensor) -> Tensor:
    """tokens (T, D), combine_weights (T, E, C) -> every expert's slots (E * C, D), empty ones zero."""
    num_tokens, num_experts, capacity = combine_weights.shape
    mask = combine_weights.bool().to(tokens.dtype).permute(1, 2, 0)  # (E, C, T)
    return torch.mm(mask.view(num_experts * capacity, num_tokens), tokens)


def static_combine(outputs: Tensor, combine_weights: Tensor) -> Tensor:
    """outputs (E * C, D), combine_weights (T, E, C) -> (T, D)."""
    if outputs.size(0) == 0:  # no tokens, hence no slots
        return outputs
    return combine_weights.view(-1, outputs.size(0)).mm(outputs)
