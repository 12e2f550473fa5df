"""Weights -> a quantised expert's block, read by the naive reader that docs/internals.md describes."""

import naive_block
import numpy as np
import pytest
import torch

from fairseq_moe_ext.experts import quantize
from fairseq_moe_ext.experts.quantize import quantize_expert
from fairseq_moe_ext.kernels.block import GROUP, Block

BITS = pytest.mark.parametrize("bits", [8, 4])
LOWEST, HIGHEST = {8: -127, 4: -8}, {8: 127, 4: 7}


def parts_of(model_dim, hidden_dim, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (hidden_dim, model_dim), (hidden_dim,), (model_dim, hidden_dim), (model_dim,)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def quantized(bits, parts, **options):
    """The block's bytes."""
    hidden_dim, model_dim = parts[0].shape
    target = torch.full((Block(bits, model_dim, hidden_dim).nbytes,), 255, dtype=torch.uint8)
    quantize_expert(Block(bits, model_dim, hidden_dim), parts, target, **options)
    return bytes(target.numpy())


def read(bits, parts, data):
    hidden_dim, model_dim = parts[0].shape
    return [part for layer in naive_block.read(bits, model_dim, hidden_dim, data) for part in layer]


def scales_of(bits, outputs, inputs, planes, data):
    """(M, G): units times scales, as float64."""
    *_, scales, units, _ = planes
    groups = -(-inputs // GROUP)
    of_groups = np.frombuffer(data, "<f2", outputs * groups, scales).reshape(outputs, groups).astype(np.float64)
    return of_groups * np.frombuffer(data, "<f4", outputs, units)[:, None]


def groups_of(weight):
    """(M, K) -> (M, G, 64) float64."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % GROUP))).astype(np.float64)
    return padded.reshape(len(weight), -1, GROUP)


def error(weights, found):
    return np.linalg.norm(found - np.asarray(weights, np.float64)) / np.linalg.norm(np.asarray(weights, np.float64))


@BITS
@pytest.mark.parametrize("dims", [(64, 128), (70, 33), (1, 1), (33, 200)], ids=str)
def test_every_code_is_the_nearest_under_its_scale_and_padding_and_gaps_are_zero(bits, dims):
    parts = parts_of(*dims)
    data = quantized(bits, parts)
    found = read(bits, parts, data)
    all_planes, size = naive_block.planes(bits, *dims)
    assert len(data) == size
    used = np.zeros(size, bool)
    for number, (outputs, inputs, groups, *at) in enumerate(all_planes):
        weight = parts[2 * number].numpy()
        scales = scales_of(bits, outputs, inputs, (outputs, inputs, groups, *at), data)
        steps = scales.repeat(GROUP, axis=1)[:, :inputs]
        wanted = np.clip(np.rint(weight / steps), LOWEST[bits], HIGHEST[bits])
        np.testing.assert_allclose(found[2 * number] / steps, wanted, atol=0.51 if bits == 8 else 1e-3)
        assert np.mean(np.rint(found[2 * number] / steps) == wanted) > 0.99
        assert np.array_equal(found[2 * number + 1], parts[2 * number + 1].double().numpy())
        group_bytes = GROUP * bits // 8
        lengths = outputs * groups * group_bytes, 2 * outputs * groups, 4 * outputs, 4 * outputs
        for start, length in zip(at, lengths, strict=True):
            used[start : start + length] = True
        codes = np.frombuffer(data, np.uint8, lengths[0], at[0]).reshape(outputs, groups, group_bytes)
        rest = inputs % GROUP
        if rest:
            last = codes[:, -1] if bits == 8 else np.concatenate((codes[:, -1] % 16, codes[:, -1] // 16), -1)
            assert (last[:, rest:] == (0 if bits == 8 else 8)).all()
    assert not np.frombuffer(data, np.uint8)[~used].any()


def test_int8_scales_are_the_largest_magnitude_over_127():
    parts = parts_of(100, 70)
    data = quantized(8, parts)
    planes, _ = naive_block.planes(8, 100, 70)
    for number, each in enumerate(planes):
        largest = np.abs(groups_of(parts[2 * number].numpy())).max(-1)
        np.testing.assert_allclose(scales_of(8, each[0], each[1], each[2:], data), largest / 127, rtol=2**-11)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_int4_scale_is_as_good_as_the_best_of_the_candidates_tried_one_by_one(weighted):
    parts = parts_of(100, 70)
    generator = np.random.default_rng(0)
    columns = [generator.exponential(size=size).astype(np.float32) for size in (100, 70)]
    given = tuple(map(torch.tensor, columns)) if weighted else (None, None)
    found = read(4, parts, quantized(4, parts, columns=given))
    for number in (0, 1):
        weight, costs = parts[2 * number].numpy(), columns[number] if weighted else np.ones(parts[2 * number].size(1))
        costs = np.pad(costs, (0, -len(costs) % GROUP)).reshape(-1, GROUP).astype(np.float64)
        errors = (costs * (groups_of(found[2 * number]) - groups_of(weight)) ** 2).sum(-1)
        for m, row in enumerate(groups_of(weight)):
            for g, values in enumerate(row):
                least = min(_least_error(values, costs[g], candidate) for candidate in quantize.CANDIDATES)
                assert errors[m, g] <= least * (1 + 1e-2)  # a scale is rounded to float16


def _least_error(values, costs, candidate):
    largest = values[np.abs(values).argmax()]
    codes = np.clip(np.rint(values * (-candidate / largest)), -8, 7)
    scale = (costs * codes * values).sum() / (costs * codes * codes).sum()
    return (costs * (values - scale * codes) ** 2).sum()


def plain_absmax(weight, limit=7):
    """Round to nearest, a group's largest magnitude over 7."""
    groups = groups_of(weight)
    steps = np.abs(groups).max(-1, keepdims=True) / limit
    return (np.rint(groups / steps) * steps).reshape(len(weight), -1)[:, : weight.shape[1]]


def output_error(inputs, weight, found):
    return np.linalg.norm(inputs @ (found - weight).T) / np.linalg.norm(inputs @ weight.T)


def heavy_tails(columns_of):
    """A matrix of Student's t of 3 degrees and inputs for it; 1% of the columns of either are 20 times as large."""
    generator = np.random.default_rng(5)
    weight, inputs = generator.standard_t(3, (256, 1024)), generator.normal(size=(512, 1024))
    large = generator.permutation(1024)[:10]
    {"weight": weight, "inputs": inputs, "neither": np.empty((1, 1024))}[columns_of][:, large] *= 20
    return weight.astype(np.float32), inputs.astype(np.float32)


@pytest.mark.parametrize("columns_of, calibrated, most", [
    ("neither", False, 0.86),  # of the error's norm; no scale of a group of 64 can do better than 0.85
    ("weight", False, 0.93),
    ("inputs", True, 0.65),
])
def test_searched_int4_scales_have_less_output_error_than_absmax_under_heavy_tails(columns_of, calibrated, most):
    weight, inputs = heavy_tails(columns_of)
    parts = [torch.tensor(weight), torch.zeros(256), torch.zeros(1024, 256), torch.zeros(1024)]
    columns = (torch.tensor((inputs**2).mean(0)) if calibrated else None, None)
    block, data = Block(4, 1024, 256), torch.empty(Block(4, 1024, 256).nbytes, dtype=torch.uint8)
    quantize_expert(block, parts, data, columns=columns)
    found = block.widen(data[None])[0][0].numpy()
    plain = output_error(inputs, weight, plain_absmax(weight))
    assert output_error(inputs, weight, found) <= most * plain


def test_no_scale_of_either_sign_does_better_under_heavy_tails():
    """Of 800 scales per sign, each with the least squares' own: what the format can give at all, against inputs whose
    features are independent and of one size."""
    weight, _ = heavy_tails("neither")
    weight = weight[:32, :512]
    found = read(4, [torch.tensor(weight), torch.zeros(32), torch.zeros(512, 32), torch.zeros(512)],
                 quantized(4, [torch.tensor(weight), torch.zeros(32), torch.zeros(512, 32), torch.zeros(512)]))[0]
    groups, gains = groups_of(weight), np.zeros((32, 8))
    largest = np.abs(groups).max(-1, keepdims=True)
    for candidate in np.geomspace(4, 40, 800):
        for sign in (1, -1):
            codes = np.clip(np.rint(groups * (sign * candidate / largest)), -8, 7)
            gains = np.maximum(gains, (codes * groups).sum(-1) ** 2 / (codes**2).sum(-1))
    least = np.sqrt((groups**2).sum() - gains.sum()) / np.linalg.norm(weight)
    assert least <= error(weight, found) * (1 + 1e-9) and error(weight, found) <= 1.01 * least
    assert least > 0.8 * error(weight, plain_absmax(weight))


@BITS
def test_errors_are_those_of_the_bits(bits):
    parts = parts_of(256, 128)
    found = read(bits, parts, quantized(bits, parts))
    for number in (0, 2):
        assert error(parts[number], found[number]) < (0.007 if bits == 8 else 0.095)


@BITS
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-6, 1e6, 1e38 / 8], ids=str)
def test_weights_of_any_magnitude_have_the_same_relative_error(bits, scale):
    parts = parts_of(70, 33)
    parts[1:2], parts[3:] = [torch.zeros(33)], [torch.zeros(70)]
    before = read(bits, parts, quantized(bits, parts))
    scaled = [part * scale for part in parts]
    after = read(bits, scaled, quantized(bits, scaled))
    for number in (0, 2):
        expected, found = error(parts[number], before[number]), error(scaled[number], after[number])
        assert found == pytest.approx(expected, rel=0.01)


@BITS
def test_units_are_powers_of_two_by_which_a_rows_largest_scale_is_from_1_to_below_2(bits):
    parts = parts_of(200, 50)
    parts[0] *= torch.logspace(-30, 30, 50)[:, None]
    data = quantized(bits, parts)
    for outputs, _, groups, _, scales, units, _ in naive_block.planes(bits, 200, 50)[0]:
        powers = np.log2(np.frombuffer(data, "<f4", outputs, units).astype(np.float64))
        assert np.array_equal(powers, np.rint(powers))
        largest = np.abs(np.frombuffer(data, "<f2", outputs * groups, scales).reshape(outputs, groups)).max(1)
        assert (largest >= 1).all() and (largest < 2).all()


@BITS
def test_groups_and_rows_of_zeros_are_zeros_and_a_row_of_zeros_has_unit_1(bits):
    parts = parts_of(192, 3)
    parts[0][0] = 0
    parts[0][1, 64:128] = 0
    data = quantized(bits, parts)
    found = read(bits, parts, data)[0]
    assert not found[0].any() and not found[1, 64:128].any() and found[1, :64].any() and found[1, 128:].any()
    (outputs, _, groups, _, scales, units, _), _ = naive_block.planes(bits, 192, 3)[0]
    assert np.frombuffer(data, "<f4", outputs, units)[0] == 1
    assert not np.frombuffer(data, "<f2", groups, scales).any()


@BITS
def test_a_group_far_below_the_others_of_its_row_is_right_to_the_rows_own_precision(bits):
    parts = parts_of(128, 4)
    parts[0][:, :64] *= 1e-5  # its scales are no normal float16
    found = read(bits, parts, quantized(bits, parts))[0]
    assert error(parts[0][:, :64], found[:, :64]) < (0.02 if bits == 8 else 0.12)
    parts[0][:, :64] *= 1e-25
    found = read(bits, parts, quantized(bits, parts))[0]
    assert np.isfinite(found).all() and np.abs(found[:, :64]).max() <= np.abs(parts[0].numpy()).max() * 2**-20


@BITS
def test_the_smallest_float32_numbers_stay_finite(bits):
    parts = [torch.full_like(part, 1e-45) for part in parts_of(70, 5)]
    found = read(bits, parts, quantized(bits, parts))
    assert all(np.isfinite(part).all() and np.abs(part).max() <= 3e-45 for part in found)


@BITS
@pytest.mark.parametrize("number, key", enumerate(["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_finite_number_is_an_error_that_names_the_tensor(bits, number, key, bad):
    parts = parts_of(70, 33)
    parts[number].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=rf"layers.1.experts.3.{key}: weights must be finite numbers to be quantised"):
        quantized(bits, parts, name="layers.1.experts.3.")


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_dtype_are_quantised_as_float32(bits, dtype):
    parts = [part.to(dtype) for part in parts_of(70, 33)]
    assert quantized(bits, parts) == quantized(bits, [part.float() for part in parts])


def test_how_many_rows_are_quantised_at_a_time_changes_nothing(monkeypatch):
    parts = parts_of(70, 33)
    whole = quantized(4, parts)
    monkeypatch.setattr(quantize, "VALUES_AT_ONCE", 100)
    assert quantized(4, parts) == whole
