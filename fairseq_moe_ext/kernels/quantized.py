"""Quantised experts on quantised rows: integer products, one scale per group, the same at every row count.

A row (float32; 16-bit ones are widened) is quantised per group of 64 inputs: a = max |x|, scale = a / 127,
code = x * (127 / a) rounded to the nearest, halves to even. Where a < 1e-30 scale and codes are 0; where the group has
an infinity or a NaN the scale is NaN. Then

    out[m] = units[m] * sum over g of (scales[m, g] * row_scale[g]) * (sum over the group of q * code) + bias[m]

with exact integer sums and float32 for the rest, g rising; then the activation. Hidden features stay float32 and are
quantised from there; the result is cast once to the rows' dtype. So a row's result depends on the row and its expert
alone.

Legend: N = rows, E = experts, S = slots, M = outputs, K = inputs, G = groups, D = model dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation, activate_rows
from fairseq_moe_ext.kernels.block import GROUP, QuantizedLinear, QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import ACTIVATIONS
from fairseq_moe_ext.kernels.loop import groups_of, run_in_two, run_loop
from fairseq_moe_ext.kernels.offsets import Offsets
from fairseq_moe_ext.kernels.quantized_kernel import FC1, FC2, kernel_for

LARGEST_CODE = 127
LEAST = 1e-30  # a group of smaller values counts as zeros: 127 / a would overflow


def run_quantized(
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: QuantizedPool,
    activation: Activation,
    outputs: Tensor,
    row_ids: Tensor | None = None,
) -> None:
    """grouped_mlp.py's signature; rows of float32, float16 or bfloat16."""
    rows = rows.contiguous()
    kernel = kernel_for(rows, outputs, pool)
    if kernel is None:
        rows = rows if row_ids is None else rows.index_select(0, row_ids)
        _run_by_pytorch(rows, offsets, slots, pool, activation, outputs)
        return
    groups = groups_of(offsets, slots, row_ids)
    if activation in ACTIVATIONS:
        kernel.run(rows, pool, groups, outputs, activation)
        return
    run_in_two(
        groups,
        torch.empty(0, pool.block.hidden_dim),
        activation,
        lambda its, hidden: kernel.run(rows, pool, its, hidden, None, [FC1]),
        lambda its, hidden: kernel.run(hidden, pool, its, outputs, None, [FC2]),
    )


def _run_by_pytorch(
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: QuantizedPool,
    activation: Activation,
    outputs: Tensor,
) -> None:
    for _, slot, first, end in _experts(offsets, slots):
        fc1, fc2 = pool.block.layers(pool.blocks[slot : slot + 1])
        hidden = apply_layer(fc1, rows[first:end].float())
        outputs[first:end] = apply_layer(fc2, activate_rows(hidden, activation))


def run_widened(
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: QuantizedPool,
    activation: Activation,
    outputs: Tensor,
) -> None:
    """As `run_quantized`, with the expert's weights in the rows' dtype and rows as they are: the reference."""
    for expert, slot, _, _ in _experts(offsets, slots):
        weights = [part.to(rows.dtype) for part in pool.block.widen(pool.blocks[slot : slot + 1])]
        run_loop(rows, offsets.part(expert, expert + 1), None, weights, activation, outputs)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (N, K) float32 -> codes (N, G, 64) float32, whole numbers from -127 to 127, and scales (N, G) float32."""
    groups = F.pad(rows, (0, -rows.size(1) % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    finite, zero = largest.isfinite(), largest < LEAST
    limit = torch.full_like(largest, LARGEST_CODE)  # a tensor: PyTorch would multiply by a number's reciprocal
    factors = limit / largest.masked_fill(~finite | zero, 1.0)
    codes = (groups * factors[..., None]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    codes = codes.masked_fill_((~finite | zero)[..., None], 0.0)
    return codes, (largest / limit).masked_fill(zero, 0.0).masked_fill(~finite, torch.nan)


def _experts(offsets: Offsets, slots: Tensor | None) -> Iterator[tuple[int, int, int, int]]:
    """(expert, slot, first row, end of its rows) of those that are computed."""
    bounds = offsets.on_host.tolist()
    places = list(range(len(offsets))) if slots is None else slots.tolist()
    for expert, (slot, first, end) in enumerate(zip(places, bounds, bounds[1:], strict=False)):
        if end > first and slot >= 0:
            yield expert, slot, first, end


def apply_layer(layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """One expert's layer on rows (n, K) float32 -> (n, M) float32. Products of a group are whole numbers below 2^24,
    which float32 sums in any order without rounding."""
    codes, row_scales = quantize_rows(rows)
    scales = layer.scales[0].float()
    sums = rows.new_zeros(rows.size(0), scales.size(0))
    for number in range(scales.size(1)):
        products = codes[:, number] @ layer.group(number)[0].float().t()
        sums += row_scales[:, number, None] * scales[None, :, number] * products
    return sums * layer.units[0] + layer.bias[0]
