"""What experts that are served alone say to whoever wants gradients of them."""

from __future__ import annotations

import torch
from torch import Tensor


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether what is computed from any of them must be differentiable."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _NoBackward(torch.autograd.Function):
    """outputs, and what they were computed from without gradients -> outputs, whose gradient is an error."""

    @staticmethod
    def forward(ctx, who: str, outputs: Tensor, *sources: Tensor) -> Tensor:
        ctx.who = who
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"{ctx.who} have no gradients: serve them under torch.no_grad()")


def without_gradients(who: str, outputs: Tensor, rows: Tensor) -> Tensor:
    """outputs of `rows`, which nothing can be trained through; a gradient through them would silently lack a part.

    RuntimeError naming `who`, a plural, where one is asked for.
    """
    return _NoBackward.apply(who, outputs, rows) if wants_gradients(rows) else outputs
