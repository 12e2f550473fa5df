"""What quantising changes: ||W - W~|| / ||W|| of each matrix, in Frobenius norms, and a table of them.

Legend: M = outputs, K = inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tabulate import tabulate
from torch import Tensor

from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY
from fairseq_moe_ext.kernels.block import QuantizedLinear

_VALUES_AT_ONCE = 1 << 17  # what is made of them stays in the processor's cache


def error_of_layer(layer: QuantizedLinear, weight: Tensor) -> float:
    """layer: one slot. weight: (M, K), what it was made of."""

    def widened(rows: slice) -> Tensor:
        planes = (plane[:, rows] for plane in (layer.codes, layer.scales, layer.units, layer.bias))
        return QuantizedLinear(*planes, layer.inputs).weight()[0]

    return _error(weight, widened)


def error_of_rounding(weight: Tensor, dtype: torch.dtype) -> float:
    """Of `weight` (M, K) in another dtype of floats."""
    return _error(weight, lambda rows: weight[rows].to(dtype))


def _error(weight: Tensor, widened) -> float:
    """widened: rows -> the same rows of W~. 0 where W is."""
    wrong = size = 0.0
    step = max(1, _VALUES_AT_ONCE // weight.size(1))
    for start in range(0, weight.size(0), step):
        rows = slice(start, start + step)
        values = weight[rows]
        values = values if values.dtype == torch.float64 else values.float()
        wrong += _sum_of_squares(values - widened(rows))
        size += _sum_of_squares(values)
    return math.sqrt(wrong / size) if size else 0.0


def _sum_of_squares(values: Tensor) -> float:
    """In float64, in which the squares of no float32 overflow or vanish."""
    values = values.double().view(-1)
    return torch.dot(values, values).item()


def error_table(errors: Mapping[str, float]) -> str:
    """errors: of each matrix by its key. Of a layer's experts one row for fc1 and one for fc2."""
    of_experts: dict[str, dict[int, float]] = {}
    matrices: dict[str, float] = {}
    for key, error in errors.items():
        match = EXPERT_KEY.match(key)
        if match:
            of_experts.setdefault(f"{match.group(1)}*{match.group(3)}", {})[int(match.group(2))] = error
        else:
            matrices[key] = error
    rows = [
        _row(name, [matrices[name]] if name in matrices else of_experts[name])
        for name in sorted({*matrices, *of_experts}, key=_in_order)
    ]
    return tabulate(rows, ("matrix", "relative error", "worst", "of expert"), tablefmt="github", disable_numparse=True)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layers by their numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _row(name: str, errors: list[float] | dict[int, float]) -> tuple[str, ...]:
    """Of one matrix, or of a layer's experts by their numbers."""
    if isinstance(errors, list):
        return name, f"{errors[0]:.5f}", "", ""
    worst = max(errors, key=errors.__getitem__)
    return name, f"{sum(errors.values()) / len(errors):.5f}", f"{errors[worst]:.5f}", str(worst)
