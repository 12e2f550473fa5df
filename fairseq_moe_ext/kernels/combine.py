"""The weighted sum of a token's expert outputs. Legend: N = rows, T = tokens, K = choices per token, D = model dim."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.choice import hardware_of
from fairseq_moe_ext.kernels.cpu_kernel import DTYPES
from fairseq_moe_ext.kernels.cpu_routing import routing_for

VALUES_OF_ONE_THREAD = 2**18  # beyond, PyTorch's threads together are faster; the values are the same


def weighted_sum(outputs: Tensor, row_ids: Tensor, weights: Tensor) -> Tensor:
    """outputs (N, D), row_ids (T, K) int64, weights (T, K) -> the weighted sum per token (T, D) in the outputs' dtype.

    row_ids: the row of each assignment; below 0 there is none, and whatever it weighs counts nothing. Sums are of
    float32 (float64 of float64), in the order of the choices, and cast once.
    """
    if outputs.size(0) == 0 or weights.size(0) == 0:  # no tokens, or none that has an expert
        return outputs if len(outputs) == len(weights) else outputs.new_zeros(weights.size(0), outputs.size(1))
    is_float64 = outputs.dtype == torch.float64  # the kernel sums in float32
    if not is_float64 and not torch.is_grad_enabled() and hardware_of(outputs.device).triton:
        from fairseq_moe_ext.kernels import triton_mlp  # imports triton, which may not be there

        return triton_mlp.weighted_sum(outputs, row_ids, weights)
    routing = routing_for(outputs, weights) if _suits_the_c_kernel(outputs, weights) else None
    if routing is not None:
        return routing.add_choices(outputs, row_ids, weights)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    parts = outputs.index_select(0, row_ids.clamp_min(0).view(-1)).to(wide).view(*row_ids.shape, -1)  # (T, K, D)
    parts = parts.mul_(weights.to(wide).unsqueeze(2)).masked_fill_((row_ids < 0).unsqueeze(2), 0)
    total, *others = parts.unbind(1)
    for other in others:
        total = total + other
    return total.to(outputs.dtype)


def _suits_the_c_kernel(outputs: Tensor, weights: Tensor) -> bool:
    if outputs.dtype not in DTYPES:
        return False
    if torch.is_grad_enabled() and (outputs.requires_grad or weights.requires_grad):
        return False
    return outputs.numel() <= VALUES_OF_ONE_THREAD or torch.get_num_threads() == 1
