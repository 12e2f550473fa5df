"""Folders in Hugging Face's layout that cannot be converted: each fault is told in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import hf_makers
import processes
import pytest
import torch
from hf_makers import converted
from safetensors.torch import load_file, save_file

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.convert import convert_nllb

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_nllb_moe.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, its tensors); not to be changed."""
    folder = tmp_path_factory.mktemp("nllb") / "hf"
    return folder, hf_makers.write_model(folder)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "hf"))


def assert_no_checkpoint(folder: Path) -> None:
    assert not list(folder.glob("*.pt"))


class TestFaults:
    def fails(self, folder: Path, tmp_path: Path, match: str, *arguments) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            convert_nllb(str(folder), str(tmp_path / "x.pt"), *arguments)
        assert "\n" not in str(caught.value)
        assert_no_checkpoint(tmp_path)

    def test_missing_shard(self, copy, tmp_path):
        (copy / "model-00002-of-00003.safetensors").unlink()
        self.fails(copy, tmp_path, "incomplete download: .* names 3 files, 1 are not there: model-00002")

    def test_missing_index_and_part(self, copy, tmp_path):
        (copy / "model.safetensors.index.json").unlink()
        (copy / "model-00003-of-00003.safetensors").unlink()
        self.fails(copy, tmp_path, "model.safetensors.index.json is not there, and the 2 parts .* not all of one model")

    def test_weights_of_another_kind_are_named(self, copy, tmp_path):
        for file in copy.glob("model*"):
            file.unlink()
        self.fails(copy, tmp_path, "no weights: neither model.safetensors nor pytorch_model.bin, whole or in parts$")
        for name in ("flax_model.msgpack", "model.fp16.safetensors"):
            (copy / name).touch()
        self.fails(copy, tmp_path, "of another kind or name: flax_model.msgpack, model.fp16.safetensors$")

    def test_weights_that_are_no_floats(self, tmp_path):
        tensors = hf_makers.write_model(tmp_path / "hf", kind="bin", shards=1)
        name = next(key for key in tensors if "expert_3" in key)
        torch.save({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "hf" / "pytorch_model.bin")
        self.fails(tmp_path / "hf", tmp_path, f"pytorch_model.bin: {name} must be of torch.float32.* got torch.int8")

    def test_truncated_shard(self, copy, tmp_path):
        shard = copy / "model-00003-of-00003.safetensors"
        os.truncate(shard, shard.stat().st_size - 100)
        self.fails(copy, tmp_path, "00003-of-00003.safetensors: truncated or damaged")

    def test_truncated_bin(self, tmp_path):
        hf_makers.write_model(tmp_path / "hf", kind="bin")
        shard = tmp_path / "hf" / "pytorch_model-00003-of-00003.bin"
        os.truncate(shard, shard.stat().st_size - 100)
        self.fails(tmp_path / "hf", tmp_path, "00003-of-00003.bin: not a readable checkpoint")

    def test_damaged_bin(self, tmp_path):
        hf_makers.write_model(tmp_path / "hf", kind="bin", shards=1)
        shard = tmp_path / "hf" / "pytorch_model.bin"
        with open(shard, "r+b") as file:
            file.seek(shard.stat().st_size // 2)
            file.write(b"\xff\x00\xff\x00")
        self.fails(tmp_path / "hf", tmp_path, "is damaged: its checksum")

    def test_lfs_pointer(self, copy, tmp_path):
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
        (copy / "model-00001-of-00003.safetensors").write_text(text)
        self.fails(copy, tmp_path, "Git LFS pointer")

    def test_tensor_missing_from_index_and_file(self, copy, tmp_path):
        shard = copy / "model-00001-of-00003.safetensors"
        tensors = load_file(shard)
        name = next(key for key in tensors if "expert_3" in key)
        del tensors[name]
        save_file(tensors, shard)
        self.fails(copy, tmp_path, f"the index says that it holds {name}")
        index = copy / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        index.write_text(json.dumps(content))
        self.fails(copy, tmp_path, f"1 tensors are missing, the first is {name}")

    def test_an_unknown_tensor_is_named(self, copy, tmp_path):
        shard = copy / "model-00001-of-00003.safetensors"
        save_file({**load_file(shard), "model.extra": torch.ones(1)}, shard)
        index = copy / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.extra"] = shard.name
        index.write_text(json.dumps(content))
        self.fails(copy, tmp_path, "1 tensors are not NLLB's, the first is model.extra")

    def test_a_tensor_of_another_shape_is_named(self, copy, tmp_path):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "decoder_ffn_dim": 25}))
        self.fails(copy, tmp_path, r"fc1.weight must be \(25, 16\) by config.json, got \(24, 16\)")

    def test_tied_tensors_that_differ(self, copy, tmp_path):
        shard = copy / "model-00001-of-00003.safetensors"
        tensors = load_file(shard)
        save_file({**tensors, "lm_head.weight": tensors["model.shared.weight"] + 1}, shard)
        index = copy / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lm_head.weight"] = shard.name
        index.write_text(json.dumps(content))
        self.fails(copy, tmp_path, "must be one tensor, found two with different values")

    @pytest.mark.parametrize(
        "change, match",
        [({"model_type": "t5"}, "model_type"), ({"router_bias": True}, "router_bias"), ({"d_model": 0}, "d_model")],
    )
    def test_another_kind_of_model_is_refused(self, copy, tmp_path, change, match):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        self.fails(copy, tmp_path, match)

    @pytest.mark.parametrize(
        "change, match",
        [
            (lambda words: [*words[:-1], "foreign"], "it lacks 1 of the model's"),
            (lambda words: words[:-1], "is of another vocabulary"),
            (lambda words: [f"w{number}" for number in range(500)], "is of another vocabulary: its 500 entries"),
        ],
    )
    def test_dictionary_of_another_vocabulary(self, made, tmp_path, change, match):
        file = hf_makers.write_dictionary(tmp_path / "dict.txt", change(hf_makers.pieces_of(made[0])))
        self.fails(made[0], tmp_path, match, str(file))

    def test_a_disk_without_room_is_told_before_anything_is_written(self, tmp_path):
        """A model that is larger than the disk; its file is a hole."""
        rows = shutil.disk_usage(tmp_path).free // (4 * 16)
        config = {**hf_makers.DENSE, "encoder_layers": 1, "encoder_ffn_dim": rows, "vocab_size": 67}
        hf_makers.write_hollow_model(tmp_path / "hf", config)
        self.fails(tmp_path / "hf", tmp_path, "x.pt: it cannot be written: No space left on device: .* bytes needed")

    @pytest.mark.slow
    def test_a_write_that_fails(self, made, tmp_path):
        command = [sys.executable, SCRIPT, made[0], "--output", tmp_path / "x.pt"]
        done = processes.run(command, file_size=100_000)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'x.pt'}: it cannot be written: ")
        assert_no_checkpoint(tmp_path)

    def test_existing_target_is_kept(self, made, tmp_path):
        (tmp_path / "x.pt").write_text("mine")
        with pytest.raises(CheckpointError, match="--force"):
            convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        assert (tmp_path / "x.pt").read_text() == "mine"

    def test_dense_model_is_said_to_be_dense(self, tmp_path, caplog):
        hf_makers.write_model(tmp_path / "hf", hf_makers.DENSE)
        with caplog.at_level("INFO", logger="fairseq_moe_ext"):
            converted(tmp_path / "hf", tmp_path / "x.pt")
        assert "converted as the dense model that it is" in caplog.text


def changed_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def nested_weights(folder: Path) -> None:
    """One file of weights that is a list in a list, 20,000 deep, by the pickle's own opcodes."""
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"a": 1}, folder / "pytorch_model.bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        for name, data in records.items():
            nested = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
            archive.writestr(name, nested if name.endswith("data.pkl") else data)


HOSTILE = {
    "a long value": (lambda folder: changed_config(folder, foo_layer="x" * 10**6), "config.json: foo_layer"),
    "a long list": (lambda folder: changed_config(folder, d_model=[1] * 9_000), "config.json: d_model must be"),
    "many fields": (lambda folder: changed_config(folder, **{f"z{n}": n for n in range(20_000)}), "10,000 values"),
    "a huge number": (lambda folder: changed_config(folder, zzz=10**400), "at most 300 digits"),
    "an endless number": (lambda folder: changed_config(folder, zzz=float("inf")), "Infinity is no number"),
    "deep lists": (lambda folder: changed_config(folder, zzz=json.loads("[" * 500 + "]" * 500)), "100 levels"),
    "positions that are not served": (
        lambda folder: changed_config(folder, max_position_embeddings=10**9),
        "config.json: max_position_embeddings must be a whole number of at least 1 and at most 1000000",
    ),
    "a file with a long name": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "x" * 5000}})
        ),
        "index.json: its files must lie beside it",
    ),
    "nested weights": (nested_weights, "pytorch_model.bin: not a readable checkpoint: RecursionError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_ends_in_one_sentence(copy, tmp_path, name):
    change, words = HOSTILE[name]
    change(copy)
    with pytest.raises(CheckpointError) as caught:
        convert_nllb(str(copy), str(tmp_path / "out.pt"))
    message = str(caught.value)
    assert words in message and str(copy) in message and len(message) < 500 and "\n" not in message, message
