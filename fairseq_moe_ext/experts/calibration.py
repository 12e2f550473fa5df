"""An expert's weights -> its block, by what a record (recording.py) says of its inputs x.

An error in an input column costs as much as the mean of its squares, by which int4 chooses its scales (quantize.py).
What quantising takes away on average comes back by the bias, which is kept as floats: b + (W - W~) E[x], at no cost
when the expert runs. Of an expert with few recorded rows the layer's figures stand for its own.

Legend: D = model dim, F = hidden dim, M = outputs, K = inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_ext.experts.quantize import quantize_expert
from fairseq_moe_ext.kernels.block import Block, QuantizedLinear
from fairseq_moe_ext.recording import Inputs, LayerRecord

LEAST_ROWS = 100  # of an expert whose own figures count


@dataclass(frozen=True)
class ColumnFigures:
    """Of a linear layer's inputs: mean (K,) and mean of squares (K,), float32."""

    mean: Tensor
    square: Tensor

    @classmethod
    def of_expert(cls, inputs: Inputs, expert: int) -> ColumnFigures | None:
        """As `inputs` has them; None where no expert of the layer has a row."""
        if not inputs.rows.any():
            return None
        if inputs.rows[expert] < LEAST_ROWS:
            mean, square = inputs.of_layer()
        else:
            mean, square = inputs.mean[expert], inputs.square[expert]
        return cls(torch.from_numpy(mean), torch.from_numpy(square))


@dataclass(frozen=True)
class Calibration:
    """Of one expert, for fc1's inputs (D,) and fc2's (F,); None: nothing is recorded of them."""

    fc1: ColumnFigures | None
    fc2: ColumnFigures | None

    @classmethod
    def of_expert(cls, layer: LayerRecord, expert: int) -> Calibration:
        """As the record of its layer has it."""
        return cls(ColumnFigures.of_expert(layer.fc1, expert), ColumnFigures.of_expert(layer.fc2, expert))


def quantize_calibrated(
    block: Block, parts: Sequence[Tensor], target: Tensor, calibration: Calibration, name: str = ""
) -> None:
    """As `quantize_expert`, by the columns' figures, with corrected biases; parts: ordinary tensors."""
    figures = calibration.fc1, calibration.fc2
    quantize_expert(block, parts, target, name, [None if each is None else each.square for each in figures])
    for layer, weight, each in zip(block.layers(target[None]), parts[::2], figures, strict=True):
        if each is not None:
            correct_bias(layer, weight, each.mean)


def correct_bias(layer: QuantizedLinear, weight: Tensor, mean: Tensor) -> None:
    """A layer of one slot, quantised from weight (M, K): to its bias what that takes from the outputs of mean (K,)."""
    layer.bias[0] += (weight.float() - layer.weight()[0]) @ mean
