"""The activations that fairseq has, and one that is as bad as any of them may be on some CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_ext.models.transformer_layer import activation_named

NAMES = ("relu", "relu_squared", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear", "swish")


def jagged(hidden: Tensor) -> Tensor:
    """What an elementwise kernel may do: the values that its vectors leave over come out a rounding away from the
    others, in each thread's part of a tensor that is large enough for several."""
    result = torch.tanh(hidden)
    size = hidden.numel()
    threads = torch.get_num_threads() if size > 16_384 else 1
    for part in result.view(-1).split(max(1, -(-size // threads))):
        tail = part[part.numel() // 64 * 64 :]
        tail += torch.finfo(tail.dtype).eps
    return result


ACTIVATIONS = {name: activation_named(name) for name in NAMES} | {"jagged": jagged}
