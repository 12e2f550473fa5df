"""The configuration in files: config.json through a fairseq checkpoint and back."""

from __future__ import annotations

import json

import hf_makers
import pytest
import torch
from hf_makers import NLLB_54B
from safetensors.torch import load_file

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.export import export_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "hf"
    hf_makers.write_model(
        path, NLLB_54B, moe_eval_capacity_token_fraction=0.0, router_ignore_padding_tokens=True, use_cache=False
    )
    return path


class TestFiles:
    @pytest.mark.parametrize("field", ["encoder_layers", "decoder_layers", "num_experts"])
    def test_counts_beyond_the_tensors_are_refused_at_once(self, folder, tmp_path, field):
        changed = self.copy(folder, tmp_path / "hf", **{field: 5000})
        with pytest.raises(CheckpointError, match=f"config.json: {field} must be at most the number of tensors"):
            convert_nllb(str(changed), str(tmp_path / "x.pt"))
        convert_nllb(str(folder), str(tmp_path / "x.pt"))
        state = torch.load(tmp_path / "x.pt", weights_only=False)
        setattr(state["args"], field.replace("num_experts", "decoder_layers"), 5000)
        torch.save(state, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match="y.pt: (en|de)coder_layers must name at most the 4 layers of"):
            export_hf(str(tmp_path / "y.pt"), str(tmp_path / "back"))

    def test_every_field_of_the_folder_comes_back(self, folder, tmp_path, caplog):
        with caplog.at_level("INFO", logger="fairseq_moe_ext"):
            convert_nllb(str(folder), str(tmp_path / "x.pt"))
        (said,) = [line for line in caplog.messages if "without effect" in line]
        for name in ("expert_capacity 64", "init_std 0.02", "max_length 200", "router_z_loss_coef"):
            assert name in said
        assert "tokenizer_class" not in said
        assert "transformers gives each expert expert_capacity slots" in caplog.text
        assert "router_ignore_padding_tokens true becomes use_moe_pad_mask False" in caplog.text
        words = str(tmp_path / "x.dict.txt")
        export_hf(str(tmp_path / "x.pt"), str(tmp_path / "back"), words, str(folder))
        before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
        assert {name: after.get(name) for name in before} == {**before, "transformers_version": None}
        convert_nllb(str(tmp_path / "back"), str(tmp_path / "again.pt"), words)
        states = [read_checkpoint(str(tmp_path / name)) for name in ("x.pt", "again.pt")]
        assert states[0]["args"] == states[1]["args"] and states[0]["extra_state"] == states[1]["extra_state"]

    @pytest.mark.parametrize("dtype, router_dtype", [(None, "float16"), (torch.float16, "bfloat16")])
    def test_a_gate_of_another_dtype_is_refused(self, folder, tmp_path, dtype, router_dtype):
        changed = self.copy(folder, tmp_path / "hf", router_dtype=router_dtype)
        with pytest.raises(CheckpointError, match="router_dtype must be float32 or the dtype of the weights"):
            convert_nllb(str(changed), str(tmp_path / "x.pt"), dtype=dtype)
        assert not list(tmp_path.glob("x.*"))

    def test_a_gate_of_the_weights_dtype_is_kept(self, folder, tmp_path):
        changed = self.copy(folder, tmp_path / "hf", router_dtype="float16")
        convert_nllb(str(changed), str(tmp_path / "x.pt"), dtype=torch.float16)
        assert read_checkpoint(str(tmp_path / "x.pt"))["args"].moe_gating_use_fp32 is False
        export_hf(str(tmp_path / "x.pt"), str(tmp_path / "back"))
        assert json.loads((tmp_path / "back" / "config.json").read_text())["router_dtype"] == "float16"

    def test_a_fairseq_checkpoint_without_a_capacity_says_so_in_hugging_faces_words(self, folder, tmp_path):
        convert_nllb(str(folder), str(tmp_path / "x.pt"))
        state = torch.load(tmp_path / "x.pt", weights_only=False)
        del state["extra_state"]["hf_config"]
        torch.save(state, tmp_path / "y.pt")
        export_hf(str(tmp_path / "y.pt"), str(tmp_path / "back"))
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        assert config["moe_eval_capacity_token_fraction"] == 0.0 and config["expert_capacity"] is None
        assert load_file(tmp_path / "back" / "model.safetensors")

    @staticmethod
    def copy(folder, target, **changes):
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        (target / "config.json").unlink()
        (target / "config.json").write_text(json.dumps({**config, **changes}))
        return target
