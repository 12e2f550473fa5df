"""Files whose checksums are right but whose content is no checkpoint's: each ends in one CheckpointError."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_makers import proving_state, split, whole

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize
from fairseq_moe_ext.checkpoints.errors import CheckpointError

GATE = "decoder.layers.1.moe_layer.gate.wg.weight"
WEIGHT = "decoder.layers.1.moe_layer.experts.0.fc1.weight"


def refused(read, path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(str(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path.parent)), message
    for word in words:
        assert word in message, message


def save_nested(path: Path, depth: int) -> None:
    """`extra_state` becomes a list in a list ... by the pickle's own opcodes, which PyTorch cannot write so deep."""
    torch.save(whole({}, extra_state="deep"), path)
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    text, nested = b"X\x04\x00\x00\x00deep", b"]" * depth + b"a" * (depth - 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            assert not name.endswith("data.pkl") or text in data
            archive.writestr(name, data.replace(text, nested) if name.endswith("data.pkl") else data)


def test_a_list_nested_too_deep(tmp_path):
    save_nested(tmp_path / "X.pt", 3)
    assert read_checkpoint(str(tmp_path / "X.pt"))["extra_state"] == [[[]]]
    save_nested(tmp_path / "X.pt", 20_000)
    refused(read_checkpoint, tmp_path / "X.pt", "X.pt: not a readable checkpoint: RecursionError")


@pytest.mark.parametrize("metadata", [{"param_metadata": [{"x": 1}]}, {"param_metadata": 3}, [1], "text"])
@pytest.mark.parametrize("name", ["shard_metadata", "fsdp_metadata"])
def test_a_description_of_shards_that_describes_nothing(tmp_path, name, metadata):
    torch.save(whole(proving_state(4), **{name: metadata}), tmp_path / "X-shard0.pt")
    refused(read_checkpoint, tmp_path / "X.pt", "X.pt: not a readable checkpoint: ")


@pytest.mark.parametrize("gate", [torch.tensor(4.0), torch.ones(8), torch.ones(8, 3, 1)], ids=lambda gate: gate.dim())
def test_a_gate_that_is_no_matrix(tmp_path, gate):
    model = {**proving_state(8), GATE: gate}
    torch.save(whole(model), tmp_path / "Y.pt")
    split(model, 2, tmp_path)
    for read in (read_checkpoint, summarize):
        refused(read, tmp_path / "Y.pt", f"Y.pt: {GATE} must have 2 dims")
        refused(read, tmp_path / "X.pt", f"X-shared.pt: {GATE} must have 2 dims")


@pytest.mark.parametrize("key", [WEIGHT, "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("tensor", [torch.tensor(4.0), torch.ones(5)], ids=lambda tensor: tensor.dim())
def test_a_summary_of_weights_that_are_no_matrix(tmp_path, key, tensor):
    torch.save(whole({**proving_state(8), key: tensor}), tmp_path / "X.pt")
    refused(summarize, tmp_path / "X.pt", f"X.pt: {key} must have 2 dims")


def test_experts_that_are_no_matrix_in_rank_files(tmp_path):
    model = proving_state(8)
    model.update({key: torch.ones(5) for key in model if key.endswith("fc1.weight")})
    split(model, 2, tmp_path)
    refused(read_checkpoint, tmp_path / "X.pt", "X-rank-0.pt: ", "an expert's fc1.weight is (5,)")
