"""What quantised weights do to a layer's experts: their outputs on the run's first rows against those of the
checkpoint's own floats, which stay in its file until they are compared.

Legend: E = experts, H = local experts, N = rows in expert order, T = tokens, R = sampled rows, D = model dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor
from fairseq_moe_ext.experts.called_by_counts import CalledByCounts
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.offsets import Offsets

FLAG = "--moe-report-weight-error"


@dataclass(frozen=True)
class WeightError:
    """Sums over compared rows: how many, the squares of the outputs' errors, the squares of the floats' outputs."""

    rows: int = 0
    error: float = 0.0
    output: float = 0.0

    def __add__(self, other: WeightError) -> WeightError:
        return WeightError(self.rows + other.rows, self.error + other.error, self.output + other.output)

    @property
    def relative(self) -> float:
        """||y - y_float|| / ||y_float||; 0 where the floats give zeros alone."""
        return (self.error / self.output) ** 0.5 if self.output > 0 else 0.0


class LayerSample:
    """The first `most` rows of one layer's local experts in the run, and what the experts made of them.

    Of a call with more rows than are still wanted every so many-th is taken, so that all its experts have their share.
    Rows of zeros, with which static gating fills up, and rows that are not finite are passed over.
    weights: H experts' parts in the order of EXPERT_KEYS, in a file.
    """

    def __init__(self, weights: list[list[Tensor]], activation: Activation, most: int):
        self._weights, self._activation, self._left = weights, activation, most
        self._taken: list[tuple[Tensor, Tensor, Tensor]] = []  # experts' indices (R,), rows and outputs (R, D)
        self._error = WeightError()

    def __deepcopy__(self, memo: dict) -> LayerSample:
        return self  # a copied model's experts, or a copied report, are of the same checkpoint

    @torch.no_grad()
    def __call__(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None, outputs: Tensor) -> None:
        """What a call's experts were given, as `CalledByCounts.run` has it, and gave."""
        bounds = offsets.on_host
        number = int(bounds[-1])
        if not self._left or not number:
            return
        rows = rows[:number] if row_ids is None else rows.index_select(0, row_ids[:number])
        outputs = outputs[:number]
        fitting = (rows.any(1) & rows.isfinite().all(1) & outputs.isfinite().all(1)).nonzero().view(-1)
        wanted = min(self._left, len(fitting))
        numbers = fitting[torch.arange(wanted, device=fitting.device) * len(fitting) // max(wanted, 1)]
        experts = torch.searchsorted(bounds[1:].long(), numbers.cpu(), right=True)
        self._taken.append((experts, *(each.index_select(0, numbers).float().cpu() for each in (rows, outputs))))
        self._left -= wanted

    @torch.no_grad()
    def compare(self) -> WeightError:
        """Of all rows so far; each is compared once, and no more than one expert's floats are in memory at a time."""
        if self._taken:
            experts, rows, outputs = map(torch.cat, zip(*self._taken, strict=True))
            self._taken.clear()
            for expert in experts.unique().tolist():
                here = experts == expert
                exact = self._run_float(self._weights[expert], rows[here])
                error, output = (each.double().square().sum().item() for each in (outputs[here] - exact, exact))
                self._error += WeightError(len(exact), error, output)
        return self._error

    def _run_float(self, parts: list[Tensor], rows: Tensor) -> Tensor:
        """rows (R, D) -> outputs (R, D) of one expert in float32."""
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (part.read().float() for part in parts)
        return F.linear(self._activation(F.linear(rows, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def sample_layers(layers: Mapping[str, MOELayer], state: Mapping[str, Tensor], most: int) -> dict[str, LayerSample]:
    """Begin to take the first `most` rows of every layer's local experts; state: the checkpoint's, before it is loaded.

    ValueError where the experts' floats do not lie in a file, from which they could be read again.
    """
    samples = {}
    for name, layer in layers.items():
        weights = _weights_of(layer.experts, f"{name}.experts.", state)
        samples[name] = LayerSample(weights, layer.experts.activation, most)
        layer.experts.observe(samples[name])
    return samples


def _weights_of(experts: CalledByCounts, prefix: str, state: Mapping[str, Tensor]) -> list[list[Tensor]]:
    found = [[state.get(f"{prefix}{expert}.{key}") for key in EXPERT_KEYS.values()] for expert in experts.local]
    for expert, parts in zip(experts.local, found, strict=True):
        if not all(isinstance(part, StoredTensor) for part in parts):
            raise ValueError(
                f"{FLAG} needs a checkpoint from whose files the experts' floats can be read again, and got one where "
                f"{prefix}{expert} lies elsewhere; `fairseq-moe convert` writes such a checkpoint"
            )
    return found
