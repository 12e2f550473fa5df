"""Quantising by a record: columns' costs, corrected biases, and the layer's figures where an expert has few rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fairseq_moe_ext.experts.calibration import LEAST_ROWS, Calibration, ColumnFigures, quantize_calibrated
from fairseq_moe_ext.experts.quantize import quantize_expert
from fairseq_moe_ext.experts.watched_inputs import InputSums
from fairseq_moe_ext.kernels.block import Block
from fairseq_moe_ext.recording import Inputs


def expert(model_dim: int = 128, hidden_dim: int = 192, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (hidden_dim, model_dim), (hidden_dim,), (model_dim, hidden_dim), (model_dim,)
    return [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]


def rows_with_a_mean(number: int = 400, dim: int = 128, seed: int = 1) -> torch.Tensor:
    """As a norm with a bias gives them: every column has a mean and a width of its own."""
    generator = torch.Generator().manual_seed(seed)
    mean, width = torch.randn(2, 1, dim, generator=generator)
    return mean + width * torch.randn(number, dim, generator=generator)


def hidden_of(parts, rows) -> torch.Tensor:
    return F.linear(rows, parts[0], parts[1]).relu()


def outputs_of(parts, rows) -> torch.Tensor:
    return F.linear(hidden_of(parts, rows), parts[2], parts[3])


def figures(rows: torch.Tensor) -> ColumnFigures:
    return ColumnFigures(rows.mean(0), rows.square().mean(0))


def quantized(bits: int, parts, calibration: Calibration | None) -> list[torch.Tensor]:
    """The parts of the block, as floats."""
    block = Block(bits, parts[0].size(1), parts[0].size(0))
    target = torch.empty(block.nbytes, dtype=torch.uint8)
    if calibration is None:
        quantize_expert(block, parts, target)
    else:
        quantize_calibrated(block, parts, target, calibration)
    return [part[0] for part in block.widen(target[None])]


@pytest.mark.parametrize("bits", [8, 4])
def test_biases_are_corrected_by_the_mean_of_the_inputs(bits):
    parts, rows = expert(), rows_with_a_mean()
    calibration = Calibration(figures(rows), figures(hidden_of(parts, rows)))
    found = quantized(bits, parts, calibration)
    for number, each in enumerate((calibration.fc1, calibration.fc2)):
        weight, bias = parts[2 * number : 2 * number + 2]
        wanted = bias.double() + (weight.double() - found[2 * number].double()) @ each.mean.double()
        torch.testing.assert_close(found[2 * number + 1], wanted.float(), rtol=1e-5, atol=1e-5)
        assert not torch.equal(found[2 * number + 1], bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_calibration_lowers_the_outputs_error_on_other_rows_of_the_same_kind(bits):
    parts, rows = expert(), rows_with_a_mean()
    seen, others = rows[:200], rows[200:]
    calibration = Calibration(figures(seen), figures(hidden_of(parts, seen)))
    wanted = outputs_of(parts, others)
    errors = [(outputs_of(quantized(bits, parts, each), others) - wanted).norm() for each in (None, calibration)]
    plain, calibrated = errors
    assert calibrated < 0.9 * plain


def test_columns_costs_alone_lower_int4s_error():
    """Without a mean nothing is corrected: what is left is the choice of scales."""
    parts, rows = expert(), rows_with_a_mean()
    rows = rows - rows.mean(0)
    costs = Calibration(ColumnFigures(torch.zeros(128), rows.square().mean(0)), None)
    wanted = F.linear(rows, parts[0])
    plain, weighted = ((F.linear(rows, quantized(4, parts, each)[0]) - wanted).norm() for each in (None, costs))
    assert weighted < plain


def recorded(counts: list[int]) -> tuple[Inputs, list[torch.Tensor]]:
    """Of experts with so many rows."""
    sums, each = InputSums(len(counts), 8), []
    for number, count in enumerate(counts):
        rows = torch.randn(count, 8, generator=torch.Generator().manual_seed(number)) + number
        each.append(rows)
        if count:
            sums.add(rows, np.array([number]), np.array([count]))
    return sums.result, each


def test_an_expert_with_few_rows_takes_the_layers_figures():
    inputs, rows = recorded([LEAST_ROWS, LEAST_ROWS - 1, 0, 300])
    everything = torch.cat(rows)
    for number, wanted in enumerate((rows[0], everything, everything, rows[3])):
        found = ColumnFigures.of_expert(inputs, number)
        torch.testing.assert_close(found.mean, wanted.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.square, wanted.square().mean(0), rtol=1e-4, atol=1e-5)


def test_a_layer_without_rows_is_quantised_as_without_a_record():
    inputs, _ = recorded([0, 0])
    nothing = ColumnFigures.of_expert(inputs, 1)
    assert nothing is None
    parts = expert()
    for found, wanted in zip(quantized(4, parts, Calibration(None, None)), quantized(4, parts, None), strict=True):
        assert torch.equal(found, wanted)
