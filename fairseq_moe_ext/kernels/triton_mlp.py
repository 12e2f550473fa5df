"""The experts of one layer as Triton kernels: two grouped products, and the weighted sum of a token's choices.

    rows (N, D) in expert order -> fc1, bias, activation -> hidden (N, F)
    hidden                      -> fc2, bias             -> outputs (N, D)
    outputs, weights            -> the weighted sum per token (T, D)

A program of a product computes one tile: some rows of one expert times some columns. How many tiles there are is only
known on the device, so that as many are launched as there can be at most, and those past the end return at once. No
atomics: every value is written once, and sums run in a fixed order in float32.

Legend: T = tokens, E = experts, S = slots, K = choices per token, N = rows, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation, activate_rows
from fairseq_moe_ext.kernels.offsets import Offsets

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
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: Sequence[Tensor],
    activation: Activation,
    outputs: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """grouped_mlp.py's signature; tiles: None chooses."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = pool
    begin = offsets.on_device
    counts = begin.diff()
    if slots is not None:
        slots = slots.to(rows.device, non_blocking=True)
        counts = counts.masked_fill(slots < 0, 0)
    if tiles is None:
        tiles = tiles_for(rows.size(0) / counts.numel(), rows.element_size(), shared_memory(rows.device))
    fused = FUSED_ACTIVATIONS.get(activation)
    with torch.cuda.device_of(rows):
        # (E,) int32: how many tiles of rows the experts up to this one have together
        tile_ends = torch.div(counts + (tiles.rows - 1), tiles.rows, rounding_mode="floor").cumsum(0, dtype=torch.int32)
        given = begin, slots, tile_ends, tiles
        hidden = rows.new_empty(rows.size(0), fc1_weight.size(1))
        _grouped_linear(rows.contiguous(), fc1_weight, fc1_bias, *given, fused, hidden)
        if fused is None:
            hidden = activate_rows(hidden, activation)
        _grouped_linear(hidden, fc2_weight, fc2_bias, *given, None, outputs)


def _grouped_linear(
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor,
    offsets: Tensor,
    slots: Tensor | None,
    tile_ends: Tensor,
    tiles: Tiles,
    activation: str | None,
    outputs: Tensor,
) -> None:
    """inputs (N, I), weights (S, O, I), biases (S, O) -> the experts' rows of outputs (N, O)."""
    num_rows, num_experts = inputs.size(0), tile_ends.numel()
    _, out_dim, in_dim = weights.shape
    row_tiles = triton.cdiv(num_rows, tiles.rows) + min(num_experts, num_rows)  # at most
    _linear_kernel[(row_tiles * triton.cdiv(out_dim, tiles.columns),)](
        inputs,
        weights,
        biases,
        outputs,
        offsets,
        offsets if slots is None else slots,
        tile_ends,
        num_experts,
        in_dim,
        out_dim,
        row_tiles,
        HAS_SLOTS=slots is not None,
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


@triton.jit
def _linear_kernel(
    inputs,
    weights,
    biases,
    outputs,
    offsets,
    slots,
    tile_ends,
    num_experts,
    in_dim,
    out_dim,
    row_tiles,
    HAS_SLOTS: tl.constexpr,
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
    rows = rows.to(tl.int64)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < out_dim

    slot = expert
    if HAS_SLOTS:
        slot = tl.load(slots + expert)
    slot = slot.to(tl.int64)  # a pool may have more than 2**31 values
    inner = tl.arange(0, INNER)
    input_places = inputs + rows[:, None] * in_dim + inner[None, :]
    weight_pointers = weights + (slot * out_dim + columns[None, :]) * in_dim + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, in_dim, INNER):
        if WHOLE_STEPS:
            row_values = tl.load(input_places + start, mask=is_row[:, None], other=0.0)
            weight_values = tl.load(weight_pointers + start, mask=is_column[None, :], other=0.0)
        else:
            is_inner = start + inner < in_dim
            row_values = tl.load(input_places + start, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            weight_values = tl.load(weight_pointers + start, mask=is_inner[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(row_values, weight_values, total, input_precision="ieee")
    total += tl.load(biases + slot * out_dim + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)  # keeps NaN, as PyTorch does
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1 + tl.math.erf(total * 0.7071067811865476))
    targets = outputs + rows[:, None] * out_dim + columns[None, :]
    tl.store(targets, total.to(outputs.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def weighted_sum(outputs: Tensor, row_ids: Tensor, weights: Tensor) -> Tensor:
    """outputs (N, D), row_ids and weights (T, K) -> the weighted sum per token (T, D), in float32, cast once.

    A row below 0 is none.
    """
    num_tokens, num_choices = weights.shape
    model_dim = outputs.size(1)
    result = outputs.new_empty(num_tokens, model_dim)
    columns = min(triton.next_power_of_2(model_dim), 512)
    with torch.cuda.device_of(outputs):
        _weighted_sum_kernel[(triton.cdiv(num_tokens, SUMMED_TOKENS), triton.cdiv(model_dim, columns))](
            outputs.contiguous(),
            row_ids.contiguous(),
            weights.contiguous(),
            result,
            num_tokens,
            model_dim,
            NUM_CHOICES=num_choices,
            TOKENS=SUMMED_TOKENS,
            COLUMNS=columns,
        )
    return result


@triton.jit
def _weighted_sum_kernel(
    outputs,
    row_ids,
    weights,
    result,
    num_tokens,
    model_dim,
    NUM_CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token, is_column = tokens < num_tokens, columns < model_dim
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        assignments = tokens * NUM_CHOICES + choice
        rows = tl.load(row_ids + assignments, mask=is_token, other=-1)  # int64
        weight = tl.load(weights + assignments, mask=is_token, other=0.0).to(tl.float32)
        is_value = (rows >= 0)[:, None] & is_column[None, :]
        values = tl.load(outputs + rows[:, None] * model_dim + columns[None, :], mask=is_value, other=0.0)
        total += tl.where(is_value, weight[:, None] * values.to(tl.float32), 0.0)
    sums = result + tokens[:, None] * model_dim + columns[None, :]
    tl.store(sums, total.to(result.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


def shared_memory(device: torch.device) -> int:
    """Bytes that one block may have."""
    if device.type != "cuda":
        return DEFAULT_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", DEFAULT_SHARED_MEMORY)
