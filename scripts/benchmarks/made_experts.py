"""Experts and dense layers of random weights, ours and PyTorch's, each as a maker of what is timed.

What the weights are makes no difference to the time. Legend: E = experts, D = model dim, F = hidden dim, M = outputs,
K = inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.kernels.block import GROUP, SMALLEST, Block, Blocks, LinearBlock, QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS
from fairseq_moe_ext.kernels.loop import run_loop
from fairseq_moe_ext.kernels.offsets import Offsets
from fairseq_moe_ext.kernels.quantized import run_quantized
from fairseq_moe_ext.kernels.quantized_linear import multiply

Call = Callable[[], Any]
Prepare = Callable[[int], Call]  # rows per expert -> what is timed: fc1, relu and fc2 of every expert


def float_experts(experts: int, dim: int, hidden: int) -> Prepare:
    """Ours in float32."""
    shapes = (experts, hidden, dim), (experts, hidden), (experts, dim, hidden), (experts, dim)
    pool = [torch.randn(shape) for shape in shapes]

    def prepare(count: int) -> Call:
        rows, offsets, outputs = _tensors(experts, dim, count)
        return lambda: run_loop(rows, offsets, None, pool, F.relu, outputs, most=ANY_ROWS)

    return prepare


def quantized_experts(experts: int, dim: int, hidden: int, bits: int) -> Prepare:
    """Ours in int8 or int4."""
    pool = _random_pool(Block(bits, dim, hidden), experts)

    def prepare(count: int) -> Call:
        rows, offsets, outputs = _tensors(experts, dim, count)
        return lambda: run_quantized(rows, offsets, None, pool, F.relu, outputs)

    return prepare


def dense_layers(layers: int, dim: int, hidden: int) -> Prepare:
    """fc1, relu and fc2 of dense layers in int8, each a module's product of its own."""
    pairs = [(int8_linear(hidden, dim), int8_linear(dim, hidden)) for _ in range(layers)]

    def prepare(count: int) -> Call:
        rows = torch.randn(count, dim)
        return lambda: [fc2(F.relu(fc1(rows))) for fc1, fc2 in pairs]

    return prepare


def int8_linear(outputs: int, inputs: int) -> Callable[[Tensor], Tensor]:
    """rows (n, K) -> (n, M), as a dense layer in int8 computes it."""
    pool = _random_pool(LinearBlock(8, outputs, inputs), 1)
    return lambda rows: multiply(rows, pool)


def pytorch_experts(experts: int, dim: int, hidden: int, bits: int) -> Prepare | None:
    """By PyTorch's products of packed weights, on bfloat16 rows. None where this PyTorch has none for these dims."""
    pairs = [(_packed(bits, hidden, dim), _packed(bits, dim, hidden)) for _ in range(experts)]

    def prepare(count: int) -> Call:
        rows = torch.randn(count, dim).bfloat16()
        return lambda: [fc2(fc1(rows).relu_()) for fc1, fc2 in pairs]

    try:
        prepare(1)()
    except (AttributeError, RuntimeError):
        return None
    return prepare


def _packed(bits: int, features: int, dim: int) -> Callable[[Tensor], Tensor]:
    if bits == 8:
        weight, scales = torch.randint(-127, 128, (features, dim), dtype=torch.int8), torch.rand(features).bfloat16()
        return lambda rows: torch.ops.aten._weight_int8pack_mm(rows, weight, scales)
    codes = torch.randint(0, 16, (features, dim), dtype=torch.int32)
    packed, scales = None, torch.rand(-(-dim // GROUP), features, 2).bfloat16()
    if hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return lambda rows: torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales)


def _random_pool(block: Blocks, slots: int) -> QuantizedPool:
    blocks = torch.randint(0, 256, (slots, block.nbytes), dtype=torch.uint8)
    for layer in block.layers(blocks):
        if block.bits == 8:
            layer.codes.clamp_(SMALLEST[8])
        layer.scales.copy_(torch.rand(layer.scales.shape) + 1)
        layer.units.fill_(2**-10)
        layer.bias.zero_()
    return QuantizedPool(block, blocks)


def _tensors(experts: int, dim: int, count: int) -> tuple[Tensor, Offsets, Tensor]:
    rows = torch.randn(experts * count, dim)
    return rows, Offsets.of_counts([count] * experts), torch.empty_like(rows)
