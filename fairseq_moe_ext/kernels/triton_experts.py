"""The experts of one layer as Triton kernels: two grouped products and a weighted sum, with nothing in between.

    rows of tokens, gathered -> fc1, bias, activation -> hidden (N, F), in expert order
    hidden                   -> fc2, bias             -> outputs (N, D), scattered to their assignments
    outputs, weights         -> the weighted sum per token (T, D)

A program of a product computes one tile: some rows of one expert times some columns. How many tiles there are is only
known on the device, so that as many are launched as there can be at most, and those past the end return at once. No
atomics: every value is written once, and sums run in a fixed order in float32.

Legend: T = tokens, E = experts, K = choices per token, N = T * K assignments, kept or not, D = model dim,
F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fairseq_moe_ext.experts.device_experts import GroupedPlan
from fairseq_moe_ext.experts.resident import activate_rows

FUSED_ACTIVATIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}  # any other runs between the products
NEIGHBOURS = 8  # tiles of rows that read the same columns of weights one after another, from the cache
SUMMED_TOKENS = 4  # per program of the weighted sum
DEFAULT_SHARED_MEMORY = 48 * 1024  # bytes that a block has on any GPU
LARGE_SHARED_MEMORY = 200 * 1024  # Hopper's and its successors', whose tensor cores want wide tiles


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up: rows, columns and inner values per tile and step; warps per tile; steps in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def tiles_for(rows_per_expert: float, itemsize: int, shared_memory: int) -> Tiles:
    """The tiles for so many rows per expert in the mean, values of `itemsize` bytes and bytes of shared memory.

    Few rows are bound by reading the weights, and want much in flight; many by arithmetic, and want large tiles.
    """
    if rows_per_expert <= 16:
        rows, columns, inner, warps = 16, 64, 256 // itemsize, 4
    elif itemsize == 4:
        rows, columns, inner, warps = 64, 64, 32, 4  # without tensor cores the registers are the limit
    elif rows_per_expert <= 96:
        rows, columns, inner, warps = 64, 128, 64, 4
    else:
        rows, columns, inner, warps = 128, 256 if shared_memory >= LARGE_SHARED_MEMORY else 128, 64, 8
    stage = (rows + columns) * inner * itemsize
    return Tiles(rows, columns, inner, warps, stages=max(1, min(4, shared_memory // stage)))


def run_triton(
    tokens: Tensor,
    plan: GroupedPlan,
    weights: Tensor,
    parameters: Sequence[Tensor],
    activation: Callable[[Tensor], Tensor],
    scale: float = 1.0,
    tiles: Tiles | None = None,
) -> Tensor:
    """`run_grouped` by the kernels below; parameters: packed, in the order of EXPERT_KEYS. tiles: None chooses."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    if tiles is None:
        rows_per_expert = plan.assignments.numel() / fc1_weight.size(0)
        tiles = tiles_for(rows_per_expert, tokens.element_size(), shared_memory(tokens.device))
    tokens = tokens.contiguous()
    fused = FUSED_ACTIVATIONS.get(activation)
    with torch.cuda.device_of(tokens):
        # (E,) int32: how many tiles of rows the experts up to this one have together
        tile_ends = torch.div(plan.tokens_per_expert + (tiles.rows - 1), tiles.rows, rounding_mode="floor")
        tile_ends = tile_ends.cumsum(0, dtype=torch.int32)
        hidden = _grouped_linear(tokens, fc1_weight, fc1_bias, plan, tile_ends, tiles, True, fused)
        if fused is None:
            hidden = activate_rows(hidden, activation)
        outputs = _grouped_linear(hidden, fc2_weight, fc2_bias, plan, tile_ends, tiles, False, None)
        return weighted_sum(outputs, weights, scale)


def _grouped_linear(
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor,
    plan: GroupedPlan,
    tile_ends: Tensor,
    tiles: Tiles,
    gather: bool,
    activation: str | None,
) -> Tensor:
    """weights (E, O, I), biases (E, O) -> (N, O), of rows that are kept.

    gather: inputs (T, I) are tokens, and outputs come in expert order; else inputs (N, I) are in expert order, and
    outputs come in the order of assignments.
    """
    num_rows = plan.assignments.numel()
    num_experts, out_dim, in_dim = weights.shape
    outputs = inputs.new_empty(num_rows, out_dim)
    row_tiles = triton.cdiv(num_rows, tiles.rows) + min(num_experts, num_rows)  # at most
    _linear_kernel[(row_tiles * triton.cdiv(out_dim, tiles.columns),)](
        inputs,
        weights,
        biases,
        outputs,
        plan.assignments,
        plan.offsets,
        tile_ends,
        num_experts,
        in_dim,
        out_dim,
        row_tiles,
        NUM_CHOICES=plan.num_choices,
        GATHER=gather,
        ACTIVATION=activation,
        EXPERTS=triton.next_power_of_2(num_experts),
        WHOLE_STEPS=in_dim % tiles.inner == 0,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        INNER=tiles.inner,
        NEIGHBOURS=NEIGHBOURS,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return outputs


@triton.jit
def _linear_kernel(
    inputs,
    weights,
    biases,
    outputs,
    assignments,
    offsets,
    tile_ends,
    num_experts,
    in_dim,
    out_dim,
    row_tiles,
    NUM_CHOICES: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    program = tl.program_id(0)
    in_band = NEIGHBOURS * tl.cdiv(out_dim, COLUMNS)
    first_tile = program // in_band * NEIGHBOURS
    height = tl.minimum(row_tiles - first_tile, NEIGHBOURS)
    tile = first_tile + program % in_band % height
    column_tile = program % in_band // height

    every_expert = tl.arange(0, EXPERTS)
    ends = tl.load(tile_ends + every_expert, mask=every_expert < num_experts, other=row_tiles)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    if expert >= num_experts:
        return
    tiles_before = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
    first_row, end_row = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    rows = first_row + (tile - tiles_before) * ROWS + tl.arange(0, ROWS)
    is_row = rows < end_row
    row_assignments = tl.load(assignments + rows, mask=is_row, other=0)  # int64
    if GATHER:
        sources, targets = row_assignments // NUM_CHOICES, rows.to(tl.int64)
    else:
        sources, targets = rows.to(tl.int64), row_assignments
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < out_dim

    expert = expert.to(tl.int64)  # a packed parameter may have more than 2**31 values
    inner = tl.arange(0, INNER)
    input_places = inputs + sources[:, None] * in_dim + inner[None, :]
    weight_places = weights + (expert * out_dim + columns[None, :]) * in_dim + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, in_dim, INNER):
        if WHOLE_STEPS:
            row_values = tl.load(input_places + start, mask=is_row[:, None], other=0.0)
            weight_values = tl.load(weight_places + start, mask=is_column[None, :], other=0.0)
        else:
            is_inner = start + inner < in_dim
            row_values = tl.load(input_places + start, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            weight_values = tl.load(weight_places + start, mask=is_inner[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(row_values, weight_values, total, input_precision="ieee")
    total += tl.load(biases + expert * out_dim + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)  # keeps NaN, as PyTorch does
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1 + tl.math.erf(total * 0.7071067811865476))
    places = outputs + targets[:, None] * out_dim + columns[None, :]
    tl.store(places, total.to(outputs.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def weighted_sum(outputs: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
    """outputs (T * K, D), weights (T, K) -> `scale` times their weighted sum (T, D); what weighs 0 is not read."""
    num_tokens, num_choices = weights.shape
    model_dim = outputs.size(1)
    result = outputs.new_empty(num_tokens, model_dim)
    columns = min(triton.next_power_of_2(model_dim), 512)
    _weighted_sum_kernel[(triton.cdiv(num_tokens, SUMMED_TOKENS), triton.cdiv(model_dim, columns))](
        outputs,
        weights.contiguous(),
        result,
        num_tokens,
        model_dim,
        scale,
        NUM_CHOICES=num_choices,
        TOKENS=SUMMED_TOKENS,
        COLUMNS=columns,
    )
    return result


@triton.jit
def _weighted_sum_kernel(
    outputs,
    weights,
    result,
    num_tokens,
    model_dim,
    scale,
    NUM_CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token, is_column = tokens < num_tokens, columns < model_dim
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        rows = tokens * NUM_CHOICES + choice
        weight = tl.load(weights + rows, mask=is_token, other=0.0).to(tl.float32)
        is_value = (weight != 0)[:, None] & is_column[None, :]
        values = tl.load(outputs + rows[:, None] * model_dim + columns[None, :], mask=is_value, other=0.0)
        total += weight[:, None] * values.to(tl.float32)
    places = result + tokens[:, None] * model_dim + columns[None, :]
    tl.store(places, (total * scale).to(result.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


def shared_memory(device: torch.device) -> int:
    """Bytes that one block may have."""
    if device.type != "cuda":
        return DEFAULT_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", DEFAULT_SHARED_MEMORY)
