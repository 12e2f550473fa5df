"""Weights quantised by the C kernel with each of its instructions and by PyTorch: the same bytes, and a twin after the
description in docs/internals.md.

Legend: M = outputs, K = inputs, G = groups.
"""

import numpy as np
import pytest
import torch
from cases import torch_threads
from kernel_calls import KERNEL_DTYPES, KERNELS, WAYS, asking_for

from fairseq_moe_ext.experts.quantize import quantize_linear
from fairseq_moe_ext.kernels.block import LinearBlock

GROUP = 64
BITS = pytest.mark.parametrize("bits", (8, 4))
WEIGHTED = pytest.mark.parametrize("weighted", (False, True))
TIE = 1e-5  # between gains


def weight_of(outputs, inputs, dtype=torch.float32, seed=0):
    """With rows of all magnitudes that the dtype has, rows and groups of zeros, and largest elements of both signs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    for row, scale in enumerate((0, 1e-7, 1e-4, 1e3, 1e4) if dtype == torch.float16 else (0, 1e-20, 1e6, 1e-42, 1e37)):
        weight[row] *= scale
    weight[5, :GROUP] = 0
    weight[6, :GROUP] *= 1e-6
    weight[7, 1:4] = torch.tensor([5.0, -5.0, 5.0])
    weight[8, 1:4] = torch.tensor([-5.0, 5.0, -5.0])
    return weight.to(dtype)


def costs_of(inputs):
    costs = torch.rand(inputs, generator=torch.Generator().manual_seed(1)) ** 4
    costs[: GROUP // 2] = 0
    return costs


def written(choice, weight, bits, columns=None, threads=1):
    """The block's bytes."""
    block = LinearBlock(bits, *weight.shape)
    pool = torch.zeros(1, block.nbytes, dtype=torch.uint8)
    with asking_for(choice), torch_threads(threads):
        quantize_linear(block.layers(pool)[0], weight, None, "layer.", columns=columns)
    return pool


@pytest.mark.parametrize("choice", KERNELS)
@BITS
@KERNEL_DTYPES
@pytest.mark.parametrize("inputs", (1, 64, 96, 100, 512))
def test_the_c_kernel_and_pytorch_write_the_same_bytes(choice, bits, dtype, inputs):
    weight = weight_of(12, max(inputs, 5), dtype)[:, :inputs]
    for columns in (None, costs_of(inputs), costs_of(inputs) * 1e30, costs_of(inputs) * 1e-35):
        assert torch.equal(written(choice, weight, bits, columns), written("off", weight, bits, columns))


@pytest.mark.parametrize("choice", KERNELS)
@WEIGHTED
def test_sums_have_one_order(choice, weighted):
    """So many groups that another order, or a fused product, rounds some scale otherwise."""
    weight, columns = weight_of(2000, 2048), costs_of(2048) if weighted else None
    assert torch.equal(written(choice, weight, 4, columns), written("off", weight, 4, columns))


@pytest.mark.parametrize("choice", WAYS)
@BITS
@WEIGHTED
@KERNEL_DTYPES
def test_scales_and_codes_are_the_descriptions(choice, bits, weighted, dtype):
    """Up to ties: of two candidates with the same gain in rounding either may be taken."""
    weight = weight_of(12, 100, dtype)
    columns = costs_of(100) if weighted else None
    block, costs = LinearBlock(bits, 12, 100), np.zeros(2 * GROUP)
    costs[:100] = 1 if columns is None else columns.numpy()
    (layer,) = block.layers(written(choice, weight, bits, columns))
    scales = layer.scales[0].double().numpy() * layer.units[0].double().numpy()[:, None]
    largest = layer.scales[0].float().abs().amax(1)
    assert ((largest >= 1) & (largest < 2) | (layer.units[0] == 2.0**-126) | (largest == 0)).all()
    assert layer.units[0, 0] == 1 and not largest[0]
    for m, row in enumerate(weight.double().numpy()):
        smallest = layer.units[0, m].item() * 2.0**-24  # between scales below float16's normal ones
        for g, values in enumerate(np.pad(row, (0, 28)).reshape(2, GROUP)):
            wanted = scales_by_hand(values, bits, costs[g * GROUP :][:GROUP])
            assert min(abs(scales[m, g] - each) for each in wanted) <= 2**-11 * abs(scales[m, g]) + smallest, (m, g)
            codes, least, most = layer.group(g)[0, m].numpy(), *((-127, 127) if bits == 8 else (-8, 7))
            if not scales[m, g]:
                assert not codes.any()
                continue
            exact = np.clip(values / scales[m, g], least, most)
            assert (np.abs(codes - exact) <= 0.5 + 1e-4).all() and (codes[100 - g * GROUP :] == 0).all()


def scales_by_hand(values, bits, costs):
    """All that the description allows, up to rounding."""
    largest = values[np.abs(values).argmax()]
    if bits == 8 or not largest:
        return [abs(largest) / 127]
    unit = abs(largest)  # else squares of 1e-42 vanish
    found = []
    for candidate in range(20):
        q = np.clip(np.rint(values * -(6 + 0.4 * candidate) / largest), -8, 7)
        products, squares = (costs * q * values).sum() / unit, (costs * q * q).sum()
        found.append((products**2 / squares if squares else 0.0, products * unit / squares if squares else 0.0))
    best = max(gain for gain, _ in found)
    return [scale for gain, scale in found if gain >= best * (1 - TIE)] if best > 0 else [-largest / 8]


@pytest.mark.parametrize("choice", KERNELS)
@BITS
@KERNEL_DTYPES
def test_threads_and_where_a_weight_lies_change_no_byte(choice, bits, dtype):
    """Rows apart, transposed, beginning within a word; more blocks of rows than threads."""
    weight = weight_of(90, 2000, dtype)
    expected = written("off", weight, bits)
    for threads in (2, 3):
        assert torch.equal(written(choice, weight, bits, threads=threads), expected)
    apart = torch.full((90, 2003), torch.nan, dtype=dtype)
    apart[:, 2:2002] = weight
    size = dtype.itemsize
    unaligned = torch.empty(weight.numel() * size + 1, dtype=torch.uint8)
    unaligned[1:] = weight.reshape(-1).view(torch.uint8)
    shifted = torch.frombuffer(unaligned.numpy(), dtype=dtype, offset=1).view(weight.shape)
    for same in (apart[:, 2:2002], weight.t().contiguous().t(), shifted):
        assert torch.equal(written(choice, same, bits), expected)
    part = written(choice, weight[40:41], bits)
    (whole,), (alone,) = (LinearBlock(bits, len(pool_rows), 2000).layers(pool)
                          for pool_rows, pool in ((weight, expected), (weight[40:41], part)))
    assert torch.equal(alone.codes[0, 0], whole.codes[0, 40]) and torch.equal(alone.scales[0, 0], whole.scales[0, 40])


@pytest.mark.parametrize("choice", WAYS)
@BITS
@KERNEL_DTYPES
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
def test_a_nan_or_an_infinity_is_named_on_any_number_of_threads(choice, bits, dtype, bad):
    for row, column, threads in ((0, 0, 1), (69, 1999, 1), (40, 1023, 3)):
        weight = torch.ones(70, 2000, dtype=dtype)
        weight[row, column] = bad
        with pytest.raises(ValueError, match=r"^layer\.weight: weights must be finite numbers to be quantised"):
            written(choice, weight, bits, threads=threads)


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("bad", (-1.0, float("nan"), float("inf")))
def test_costs_that_are_no_costs_are_refused(choice, bad):
    columns = torch.ones(70)
    columns[69] = bad
    with pytest.raises(ValueError, match="columns must be finite numbers of at least 0"):
        written(choice, torch.ones(3, 70), 4, columns)


@pytest.mark.parametrize("choice", KERNELS)
def test_misfits_are_refused(choice):
    block = LinearBlock(4, 3, 70)
    (layer,) = block.layers(torch.zeros(1, block.nbytes, dtype=torch.uint8))
    message = r"weight and columns must be \(3, 70\) and \(2, 64\), got \(3, 71\) and None"
    with asking_for(choice), pytest.raises(ValueError, match=message):
        quantize_linear(layer, torch.ones(3, 71), None)
