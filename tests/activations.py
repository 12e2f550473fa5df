"""The activations that fairseq has, and one that is worse than any of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_ext.models.transformer_layer import activation_named

NAMES = ("relu", "relu_squared", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear", "swish")


def jagged(hidden: Tensor) -> Tensor:
    """What an elementwise kernel may do: the last values of its input come out a rounding away from the others."""
    result = torch.tanh(hidden)
    tail = result.view(-1)[-(hidden.numel() % 16 + 1) :]
    tail += torch.finfo(tail.dtype).eps
    return result


ACTIVATIONS = {name: activation_named(name) for name in NAMES} | {"jagged": jagged}
