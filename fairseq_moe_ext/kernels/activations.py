"""An expert's activation on many rows at once, with the bits that each row has alone."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.kernels.alignment import aligned

Activation = Callable[[Tensor], Tensor]  # elementwise

# Of PyTorch's elementwise functions on a CPU: values that the widest loop takes at once (two AVX-512 vectors of 16-bit
# numbers), and up to how many values one thread computes alone (gelu's; the others' limits lie above it).
VECTOR_VALUES = 64
VALUES_OF_ONE_THREAD = 16_384


def activate_rows(hidden: Tensor, activation: Activation) -> Tensor:
    """hidden (N, F), which may be overwritten on a CPU -> the activation of every row as if it were alone.

    On a CPU PyTorch computes some of a tensor's values with vector instructions and the last few of each thread's part
    without, and rounds them differently: of many rows at once a value's bits would depend on where its row lies. Here
    no value is left over, and no part is shared by threads.
    """
    if hidden.device.type != "cpu":
        return activation(hidden)
    dim = hidden.size(1)
    padded = F.pad(hidden, (0, -dim % VECTOR_VALUES)).contiguous()
    for part in padded.view(-1).split(VALUES_OF_ONE_THREAD):
        part.copy_(activation(aligned(part)))
    return padded[:, :dim].contiguous()
