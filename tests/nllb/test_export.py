"""NLLB to fairseq's checkpoint and back to Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path

import hf_makers
import pytest
import torch
from full_disk import full_at
from safetensors.torch import load_file

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.nllb.config import NllbConfig
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.export import export_hf
from fairseq_moe_ext.nllb.names import named_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, its tensors); not to be changed."""
    folder = tmp_path_factory.mktemp("nllb") / "hf"
    return folder, hf_makers.write_model(folder)


def read_back(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {key: tensor.read() for key, tensor in read_checkpoint(str(checkpoint))["model"].items()}


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


class TestThereAndBack:
    @pytest.mark.parametrize("config", [hf_makers.TINY, hf_makers.DENSE], ids=["moe", "dense"])
    def test_bit_identical_with_rows_in_another_order(self, tmp_path, config):
        theirs = hf_makers.write_model(tmp_path / "hf", config)
        file = hf_makers.write_dictionary(tmp_path / "dict.txt", hf_makers.pieces_of(tmp_path / "hf")[::-1])
        convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"), str(file))
        arguments = (str(tmp_path / "x.pt"), str(tmp_path / "back"), str(file), str(tmp_path / "hf"))
        export_hf(*arguments, shard_bytes=50_000)
        back = load_folder(tmp_path / "back")
        assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[key], theirs[key]) for key in theirs)
        again = read_back(convert_nllb(str(tmp_path / "back"), str(tmp_path / "again.pt"), str(file)).files[0])
        before = read_back(tmp_path / "x.pt")
        assert all(torch.equal(again[key], before[key]) for key in before)

    def test_the_configuration_survives(self, made, tmp_path):
        convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        export_hf(str(tmp_path / "x.pt"), str(tmp_path / "back"))
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (made[0], tmp_path / "back"))
        without_meaning = {"expert_capacity", "dropout"}  # training's
        assert {key: after[key] for key in before if key not in without_meaning} == {
            key: value for key, value in before.items() if key not in without_meaning
        }

    def test_a_full_disk_leaves_nothing(self, made, tmp_path):
        convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        before = sorted(tmp_path.iterdir())
        with full_at(1 << 14), pytest.raises(CheckpointError, match="back: it cannot be written: .*large"):
            export_hf(str(tmp_path / "x.pt"), str(tmp_path / "back"))
        assert sorted(tmp_path.iterdir()) == before

    def test_a_refused_checkpoint_leaves_no_folder(self, tmp_path):
        with pytest.raises(CheckpointError):
            export_hf(str(tmp_path / "missing.pt"), str(tmp_path / "new" / "back"))
        assert list(tmp_path.iterdir()) == []

    def test_upstreams_own_checkpoint(self, shared_goldens, tmp_path):
        source = shared_goldens / "mt_nllb_ws2" / "checkpoint_last.pt"
        export_hf(str(source), str(tmp_path / "hf"))
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        back = MoEConfig.from_args(NllbConfig.from_hf(config, "").to_fairseq())
        served = MoEConfig.from_args(read_checkpoint(str(source))["cfg"]["model"])
        for name in MoEConfig.__dataclass_fields__.keys() - {"_name", "moe_normalize_expert_grad"}:
            assert getattr(back, name) == getattr(served, name), name
        assert len(load_folder(tmp_path / "hf")) == len(list(named_tensors(NllbConfig.from_hf(config, ""))))

    @pytest.mark.parametrize("fraction, said", [(1.0, False), (0.25, True), (0.0, True)])
    def test_a_capacity_that_only_transformers_applies_is_said(self, made, tmp_path, caplog, fraction, said):
        convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        state = torch.load(tmp_path / "x.pt", weights_only=False)
        state["args"].moe_eval_capacity_token_fraction = fraction
        torch.save(state, tmp_path / "y.pt")
        export_hf(str(tmp_path / "y.pt"), str(tmp_path / "back"))
        assert ("transformers drops what is beyond" in caplog.text) is said

    def test_an_existing_folder_is_kept(self, made, tmp_path):
        convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        (tmp_path / "back").mkdir()
        with pytest.raises(CheckpointError, match="exists already"):
            export_hf(str(tmp_path / "x.pt"), str(tmp_path / "back"))
