"""The experts of every token, and their weights: few numbers, for which PyTorch takes many passes and the C kernel one.

Both give the same bits. Legend: T = tokens, K = choices per token, E = experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.cpu_routing import CRouting, routing_for


def choose_experts(
    probabilities: Tensor, logits: Tensor | None, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """probabilities (T, E), logits (T, E) or None, padding_mask (T,) bool or None -> expert_ids (T, K) int64, the
    expert of the largest probability and, where there are logits, the one of the largest other logit (of equal ones
    the first); kept (T, K) bool, False on padding; weights (T, K), their probabilities.
    """
    given = [probabilities] if logits is None else [probabilities, logits]
    routing = _c_routing(*given)
    if routing is not None:
        return routing.choose(*[each.contiguous() for each in given], *[None] * (2 - len(given)), padding_mask)
    expert_ids = probabilities.argmax(dim=1, keepdim=True)
    if logits is not None:
        second = logits.scatter(1, expert_ids, float("-inf")).argmax(dim=1, keepdim=True)
        expert_ids = torch.cat((expert_ids, second), dim=1)
    if padding_mask is None:
        kept = torch.ones_like(expert_ids, dtype=torch.bool)
    else:
        kept = (~padding_mask).unsqueeze(1).expand_as(expert_ids)
    return expert_ids, kept, probabilities.gather(1, expert_ids)


def normalize(weights: Tensor, kept: Tensor) -> Tensor:
    """weights and kept (T, K) -> those that are kept divided by their sum, which is held above the dtype's eps; exactly
    zero where not kept, whatever is there.
    """
    least = torch.finfo(weights.dtype).eps
    routing = _c_routing(weights)
    if routing is not None:
        return routing.normalize(weights.contiguous(), kept, least)
    weights = weights.masked_fill(~kept, 0)
    return (weights / weights.sum(dim=1, keepdim=True).clamp_min(least)).masked_fill(~kept, 0)


def _c_routing(*values: Tensor) -> CRouting | None:
    if any(each.dtype != torch.float32 or each.requires_grad and torch.is_grad_enabled() for each in values):
        return None
    return routing_for(*values)
