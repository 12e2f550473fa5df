"""`fairseq-moe quantize --calibrate`: every expert as a record of its inputs has it quantised."""

import re

import numpy as np
import pytest
import torch
from checkpoint_makers import whole
from quantized_sources import PARTS, quantize, random_state

from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.experts.calibration import Calibration, quantize_calibrated
from fairseq_moe_ext.kernels.block import Block
from fairseq_moe_ext.recording import Choices, Inputs, LayerRecord, Record, Sample, fingerprint, save_record

MODEL = random_state()
LAYERS = [f"decoder.layers.{layer}.moe_layer" for layer in (0, 1)]


def layer_record(seed: int, model_dim: int = 70) -> LayerRecord:
    numbers = np.random.default_rng(seed)
    means = [numbers.normal(size=(4, dim)).astype(np.float32) for dim in (model_dim, 96)]
    fc1, fc2 = (Inputs(np.array([500, 200, 20, 0]), mean, mean**2 + 1) for mean in means)
    choices = Choices(np.zeros((1, 4), np.int64), np.zeros((1, 4)), np.zeros((1, 4), np.int64))
    sampled = np.zeros((0, model_dim), np.float16), np.zeros((0, 2), np.int32), np.zeros(0, np.int32)
    return LayerRecord(fc1, fc2, choices, Sample(np.zeros(0, np.uint64), *sampled))


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "X.pt"
    cfg = {"model": {"_name": "transformer_lm"}, "task": {}}
    torch.save(whole(MODEL, cfg=cfg, optimizer_history=[{"num_updates": 7}]), file)
    return file


def test_experts_are_those_of_the_calibrated_quantiser(source, tmp_path):
    record = Record(("",), {name: layer_record(number) for number, name in enumerate(LAYERS)})
    save_record(tmp_path / "record.npz", record)
    assert quantize(source, tmp_path / "Q.safetensors", "--calibrate", str(tmp_path / "record.npz")) == 0
    file = QuantizedFile(tmp_path / "Q.safetensors")
    assert file.about.calibrated == fingerprint(tmp_path / "record.npz")
    block, tensors = Block(4, 70, 96), file.tensors()
    for name in LAYERS:
        for expert in range(4):
            parts = [MODEL[f"{name}.experts.{expert}.{part}"] for part in PARTS]
            wanted = torch.zeros(block.nbytes, dtype=torch.uint8)
            quantize_calibrated(block, parts, wanted, Calibration.of_expert(record.layers[name], expert))
            assert torch.equal(tensors[f"{name}.experts.{expert}.int4"].read(), wanted)


@pytest.mark.parametrize("layers, message", [
    ({LAYERS[0]: layer_record(0)}, r"must be a record of this model, .* got no such layer"),
    ({name: layer_record(0, 64) for name in LAYERS}, r"a record of this model, .* got 4 experts of dims \(64, 96\)"),
    (None, "--calibrate .*record.npz: not a record"),
])
def test_what_is_no_record_of_the_model_is_one_sentence(layers, message, source, tmp_path, capsys):
    if layers is None:
        (tmp_path / "record.npz").write_bytes(b"nothing")
    else:
        save_record(tmp_path / "record.npz", Record(("",), layers))
    assert quantize(source, tmp_path / "Q.safetensors", "--calibrate", str(tmp_path / "record.npz")) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "Q.safetensors").exists()
