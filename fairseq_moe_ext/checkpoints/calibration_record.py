"""The record that a user gives to quantise by (`--calibrate`), held against the model that is quantised."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.checkpoints.quantized_layout import QuantizedLayout, QuantizedTensor
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY
from fairseq_moe_ext.experts.calibration import Calibration
from fairseq_moe_ext.kernels.block import Block
from fairseq_moe_ext.recording import Record, fingerprint, load_record


@dataclass(frozen=True)
class CalibrationRecord:
    """fingerprint: of its file."""

    path: str
    record: Record
    fingerprint: str

    def check(self, layout: QuantizedLayout, kept: KeptExperts | None = None) -> None:
        """CheckpointError where it is of another model. kept: of a pruned one; the record is of the whole model."""
        for tensor in layout.tensors.values():
            if not isinstance(tensor.block, Block):
                continue
            name, number = _place_of(tensor, kept)
            layer = self.record.layers.get(name)
            wanted = tensor.block.model_dim, tensor.block.hidden_dim
            found = None if layer is None else (layer.fc1.mean.shape[1], layer.fc2.mean.shape[1])
            if layer is None or found != wanted or number >= layer.num_experts:
                got = "no such layer" if layer is None else f"{layer.num_experts} experts of dims {found}"
                raise CheckpointError(
                    f"{self.path}: must be a record of this model, with expert {number} of dims {wanted} in {name}, "
                    f"got {got}"
                )

    def of_expert(self, tensor: QuantizedTensor, kept: KeptExperts | None = None) -> Calibration:
        """What it says of an expert's inputs; kept: as of `check`."""
        name, number = _place_of(tensor, kept)
        return Calibration.of_expert(self.record.layers[name], number)


def _place_of(tensor: QuantizedTensor, kept: KeptExperts | None) -> tuple[str, int]:
    """An expert's layer and number in the whole model."""
    match = EXPERT_KEY.match(tensor.keys[0])
    name, number = match.group(1).removesuffix(".experts."), int(match.group(2))
    return name, number if kept is None else kept.layers[name][number]


def read_calibration(path: str) -> CalibrationRecord:
    """CheckpointError where `path` is no record."""
    try:
        return CalibrationRecord(path, load_record(path), fingerprint(path))
    except ValueError as error:
        raise CheckpointError(f"--calibrate {error}") from error
