"""Folders made by transformers' own names and shapes (goldens/hf_nllb.json), without the converter's table of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hf_makers
import pytest
import torch
from fairseq.data import Dictionary
from safetensors.torch import load_file, save_file

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.models.moe_transformer import MoETransformerModel
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.export import export_hf

GOLDENS = json.loads((Path(__file__).resolve().parents[1] / "goldens" / "hf_nllb.json").read_text())
# as read in both projects' code
RENAMED = (
    (r"^model\.", ""),
    (r"\.ffn\.router\.classifier\.", ".moe_layer.gate.wg."),
    (r"\.ffn\.experts\.expert_", ".moe_layer.experts."),
    (r"\.ffn\.fc", ".fc"),
    (r"\.cross_attention", ".encoder_attn"),
    (r"\.ff_layer_norm\.", ".final_layer_norm."),
)
EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")


def fairseq_names(name: str) -> tuple[str, ...]:
    for pattern, renamed in RENAMED:
        name = re.sub(pattern, renamed, name)
    return EMBEDDINGS if name == "shared.weight" else (name,)


@pytest.fixture(scope="module", params=GOLDENS)
def folder(request, tmp_path_factory):
    """(the golden, a folder of it with random weights, those)"""
    path, golden = tmp_path_factory.mktemp("golden"), GOLDENS[request.param]
    hf_makers.write_tokenizer(path)
    (path / "config.json").write_text(json.dumps(golden["config"]))
    tensors = {name: torch.randn(shape) for name, shape in golden["tensors"].items()}
    save_file(tensors, path / "model.safetensors")
    return golden, path, tensors


def test_every_tensor_comes_to_its_place_in_fairseqs_own_model(folder, tmp_path):
    _, path, theirs = folder
    done = convert_nllb(str(path), str(tmp_path / "x.pt"))
    state = read_checkpoint(str(done.files[0]))
    found = {name: tensor.read() for name, tensor in state["model"].items()}
    wanted = {ours: tensor for name, tensor in theirs.items() for ours in fairseq_names(name)}
    assert found.keys() - wanted.keys() == {"encoder.version", "decoder.version"} and not wanted.keys() - found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    class Task:
        source_dictionary = target_dictionary = Dictionary()

    for number in range(len(found[EMBEDDINGS[0]]) - 4):
        Task.source_dictionary.add_symbol(f"w{number}")
    model = MoETransformerModel.build_model(state["args"], Task())
    own = model.state_dict().keys() - {f"{side}.embed_positions._float_tensor" for side in ("encoder", "decoder")}
    assert own | {"encoder.version", "decoder.version"} == found.keys()
    model.load_state_dict(state["model"], strict=True)


def test_the_way_back_gives_transformers_names_and_configuration(folder, tmp_path):
    golden, path, theirs = folder
    done = convert_nllb(str(path), str(tmp_path / "x.pt"))
    export_hf(str(done.files[0]), str(tmp_path / "back"), str(done.files[1]), str(path))
    found = load_file(tmp_path / "back" / "model.safetensors")
    whole = {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in theirs.items()}
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in found)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    bookkeeping = {"architectures", "transformers_version"}  # the head comes with it
    assert {name: config.get(name) for name in golden["config"].keys() - bookkeeping} == {
        name: golden["config"][name] for name in golden["config"].keys() - bookkeeping
    }
