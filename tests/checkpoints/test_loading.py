"""On the way from the files into the model: damage is found, time and bytes are reported, nothing is kept."""

from __future__ import annotations

import json
import re

import commands
import pytest
import torch
from checkpoint_makers import split
from small_lm import served_state, small_lm

from fairseq_moe_ext.checkpoints import loading
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor
from fairseq_moe_ext.experts.resident import ResidentExperts


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return small_lm(tmp_path_factory.mktemp("lm"))


@pytest.mark.parametrize("key", ["decoder.layers.0.fc1.weight", "decoder.layers.1.moe_layer.experts.3.fc1.weight"])
def test_a_damaged_weight_ends_the_command(lm, tmp_path, key):
    data, content = lm
    torch.save(content, tmp_path / "X.pt")
    file = bytearray((tmp_path / "X.pt").read_bytes())
    file[file.index(content["model"][key].numpy().tobytes()) + 9] ^= 4
    (tmp_path / "X.pt").write_bytes(file)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "X.pt")) + ": record .* is damaged: its checks"):
        commands.eval_lm(data, "--path", tmp_path / "X.pt", *commands.LM)


def test_a_weight_within_a_larger_record_is_checked_too(lm, tmp_path):
    _, content = lm
    packed = torch.arange(40.0).view(4, 10)
    torch.save({**content, "model": {str(row): packed[row] for row in range(4)}}, tmp_path / "X.pt")
    file = bytearray((tmp_path / "X.pt").read_bytes())
    start = file.index(packed.numpy().tobytes())
    file[start] ^= 1
    (tmp_path / "X.pt").write_bytes(file)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(str(tmp_path / "X.pt"))["model"]["3"].read()


def test_a_file_cut_off_after_it_was_opened(lm, tmp_path):
    _, content = lm
    torch.save(content, tmp_path / "X.pt")
    state = read_checkpoint(str(tmp_path / "X.pt"))["model"]
    with open(tmp_path / "X.pt", "r+b") as file:
        file.truncate(30_000)
    with pytest.raises(CheckpointError, match="X.pt: not a readable checkpoint: it ends within a tensor"):
        for tensor in state.values():
            tensor.read()


def test_reading_a_state_reads_no_weight_and_no_optimizer(lm, tmp_path):
    _, content = lm
    content = {**content, "last_optimizer_state": {"state": {0: torch.zeros(1000)}}}
    split(content["model"], 2, tmp_path, template=lambda model: {**content, "model": model})
    state = read_checkpoint(str(tmp_path / "X.pt"))["model"]
    assert all(type(tensor) is StoredTensor for tensor in state.values())
    assert state.loading.bytes == 0 and state.had_optimizer
    assert state["decoder.embed_tokens.weight"].sum() == content["model"]["decoder.embed_tokens.weight"].sum()
    assert state.loading.bytes == content["model"]["decoder.embed_tokens.weight"].nbytes


@pytest.mark.parametrize("new_format", [True, False])
def test_seconds_and_bytes_are_in_the_report(lm, tmp_path, new_format):
    data, content = lm
    torch.save(content, tmp_path / "X.pt", _use_new_zipfile_serialization=new_format)
    flags = (*commands.LM, "--tokens-per-sample", "16", "--moe-report", tmp_path / "report.json")
    commands.eval_lm(data, "--path", tmp_path / "X.pt", *flags)
    found = json.loads((tmp_path / "report.json").read_text())["loading"]
    assert found.keys() == {"seconds", "bytes", "seconds_per_gb"}
    assert found["bytes"] == pytest.approx(sum(tensor.nbytes for tensor in content["model"].values()), abs=8)
    assert found["seconds_per_gb"] == pytest.approx(found["seconds"] / found["bytes"] * 1e9)


@pytest.mark.parametrize(("patience", "is_shown"), [(0.0, True), (60.0, False)])
def test_a_bar_appears_where_it_takes_long(lm, tmp_path, monkeypatch, capfd, patience, is_shown):
    data, content = lm
    monkeypatch.setattr(loading, "BAR_DELAY", patience)
    torch.save(content, tmp_path / "X.pt")
    served_state(data, tmp_path / "X.pt")
    output = capfd.readouterr()
    assert (f"loading {tmp_path / 'X.pt'}" in output.err) is is_shown
    assert "loading" not in output.out


def test_loading_reports_zeros_where_nothing_was_read():
    assert Loading("X.pt").as_dict() == {"seconds": 0.0, "bytes": 0, "seconds_per_gb": 0.0}


@pytest.mark.parametrize("strict", [True, False])
def test_experts_without_values_must_all_be_loaded(strict):
    state = ResidentExperts(3, 4, 5).state_dict()
    experts = ResidentExperts(3, 4, 5, initialize=False)
    experts.load_state_dict(state, strict=strict)
    assert all(torch.equal(tensor, state[key]) for key, tensor in experts.state_dict().items())
    del state["1.fc2.bias"]
    with pytest.raises(RuntimeError, match="1.fc2.bias"):
        ResidentExperts(3, 4, 5, initialize=False).load_state_dict(state, strict=strict)
    if not strict:
        ResidentExperts(3, 4, 5).load_state_dict(state, strict=False)
