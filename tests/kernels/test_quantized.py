"""Quantised experts on quantised rows, beside a twin that computes number by number."""

import naive_block
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS

from fairseq_moe_ext.kernels.block import Block, QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import VARIABLE
from fairseq_moe_ext.kernels.offsets import Offsets
from fairseq_moe_ext.kernels.quantized import run_quantized, run_widened


@pytest.fixture(autouse=True, params=["auto", "off"])
def by_c_or_pytorch(monkeypatch, request):
    monkeypatch.setenv(VARIABLE, request.param)


BITS = pytest.mark.parametrize("bits", [8, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def pool_of(bits, model_dim, hidden_dim, experts):
    data = [naive_block.made(bits, model_dim, hidden_dim, seed) for seed in range(experts)]
    blocks = torch.tensor(np.stack([np.frombuffer(each, np.uint8) for each in data]))
    return QuantizedPool(Block(bits, model_dim, hidden_dim), blocks), data


def rows_of(counts, dim, dtype=torch.float32, seed=0):
    return torch.randn(sum(counts), dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def computed(pool, rows, counts, slots=None, activation=F.relu, run=run_quantized):
    outputs = torch.full_like(rows, torch.nan)
    run(rows, Offsets.of_counts(counts), slots, pool, activation, outputs)
    return outputs


@BITS
@pytest.mark.parametrize("dims", [(64, 128), (70, 33), (1, 200)], ids=str)
def test_run_quantized_computes_what_the_naive_twin_does(bits, dims):
    counts, slots = [2, 0, 3, 1], torch.tensor([2, 0, 1, 3], dtype=torch.int32)
    pool, data = pool_of(bits, *dims, 4)
    rows = rows_of(counts, dims[0])
    outputs = computed(pool, rows, counts, slots)
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row, output, owner in zip(rows.numpy(), outputs, owners, strict=True):
        layers = naive_block.read(bits, *dims, data[slots[owner]])
        expected = naive_block.mlp(layers, row, lambda hidden: np.maximum(hidden, 0))
        # a hidden feature may round to the next code: one step of its group, 1 / 127 of the largest
        np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@BITS
@DTYPES
@pytest.mark.parametrize("run", [run_quantized, run_widened])
def test_a_row_alone_in_any_slot_has_the_bits_that_it_has_among_others(monkeypatch, bits, dtype, run):
    if run is run_widened:
        monkeypatch.delenv(VARIABLE)  # without the C kernel PyTorch's products round few rows otherwise
    for name, activation in ACTIVATIONS.items():
        counts = [40, 1, 0, 7]
        pool, _ = pool_of(bits, 70, 33, 4)
        rows = rows_of(counts, 70, dtype)
        together = computed(pool, rows, counts, activation=activation, run=run)
        moved = QuantizedPool(pool.block, pool.blocks.flip(0).contiguous())
        for row, expert in ((0, 0), (39, 0), (40, 1), (41, 3)):
            slots = torch.tensor([3 - expert], dtype=torch.int32)
            alone = computed(moved, rows[row : row + 1], [1], slots, activation, run)
            assert torch.equal(alone[0], together[row]), name


@BITS
def test_16_bit_rows_are_widened_and_the_result_is_cast_once(bits):
    pool, _ = pool_of(bits, 64, 64, 1)
    rows = rows_of([5], 64, torch.bfloat16)
    assert torch.equal(computed(pool, rows, [5]), computed(pool, rows.float(), [5]).bfloat16())


@BITS
def test_run_widened_takes_rows_as_they_are(bits):
    pool, _ = pool_of(bits, 70, 33, 2)
    rows = rows_of([3, 2], 70)
    fc1, bias1, fc2, bias2 = pool.block.widen(pool.blocks)
    expected = torch.cat([F.linear(F.relu(F.linear(part, fc1[e], bias1[e])), fc2[e], bias2[e])
                          for e, part in enumerate(rows.split([3, 2]))])
    torch.testing.assert_close(computed(pool, rows, [3, 2], run=run_widened), expected)


@BITS
def test_rows_of_a_negative_slot_are_left_alone(bits):
    pool, _ = pool_of(bits, 64, 64, 2)
    for run in (run_quantized, run_widened):
        outputs = computed(pool, rows_of([2, 3], 64), [2, 3], torch.tensor([-1, 0], dtype=torch.int32), run=run)
        assert outputs[:2].isnan().all() and not outputs[2:].isnan().any()


@BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others_alone(bits, bad):
    pool, _ = pool_of(bits, 130, 64, 1)
    rows = rows_of([3], 130)
    expected = computed(pool, rows, [3])
    rows[1, 70] = bad
    outputs = computed(pool, rows, [3], activation=lambda hidden: hidden)
    assert outputs[1].isnan().all()
    outputs = computed(pool, rows, [3])
    assert torch.equal(outputs[[0, 2]], expected[[0, 2]])


@BITS
def test_rows_of_zeros_and_of_values_near_zero_give_the_biases(bits):
    pool, data = pool_of(bits, 64, 64, 1)
    rows = torch.stack([torch.zeros(64), torch.full((64,), 9e-31)])
    outputs = computed(pool, rows, [2])
    assert torch.equal(outputs[0], outputs[1])
    large = computed(pool, torch.full((1, 64), 1e30), [1])
    assert large.isfinite().all()
