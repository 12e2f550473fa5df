"""NLLB from Hugging Face's layout and back: every tensor in its place, faults told, runs resumed."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import hf_makers
import processes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.dictionary_checksum import dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.export import export_hf

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_nllb_moe.py"
main = runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, its tensors); not to be changed."""
    folder = tmp_path_factory.mktemp("nllb") / "hf"
    return folder, hf_makers.write_model(folder)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "hf"))


def converted(folder: Path, target: Path, *arguments, **options) -> dict[str, torch.Tensor]:
    done = convert_nllb(str(folder), str(target), *arguments, **options)
    state = read_checkpoint(str(done.files[0]))
    return {key: tensor.read() for key, tensor in state["model"].items()}


def assert_no_checkpoint(folder: Path) -> None:
    assert not list(folder.glob("*.pt"))


class TestTensors:
    def test_names_are_fairseqs_and_values_the_folders(self, made, tmp_path):
        folder, theirs = made
        ours = converted(folder, tmp_path / "x.pt")
        for hf, fairseq in (
            ("model.encoder.layers.1.ffn.experts.expert_5.fc1.bias", "encoder.layers.1.moe_layer.experts.5.fc1.bias"),
            ("model.decoder.layers.3.ffn.experts.expert_7.fc2.bias", "decoder.layers.3.moe_layer.experts.7.fc2.bias"),
            ("model.encoder.layers.3.ffn.router.classifier.weight", "encoder.layers.3.moe_layer.gate.wg.weight"),
            ("model.decoder.layers.0.ffn.fc1.weight", "decoder.layers.0.fc1.weight"),
            ("model.decoder.layers.2.cross_attention.q_proj.bias", "decoder.layers.2.encoder_attn.q_proj.bias"),
            ("model.decoder.layers.2.cross_attention_layer_norm.bias", "decoder.layers.2.encoder_attn_layer_norm.bias"),
            ("model.encoder.layers.2.ff_layer_norm.weight", "encoder.layers.2.final_layer_norm.weight"),
            ("model.decoder.layer_norm.weight", "decoder.layer_norm.weight"),
        ):
            assert torch.equal(ours[fairseq], theirs[hf]), fairseq
        numel = sum(tensor.numel() for tensor in theirs.values())
        tied = ours["decoder.embed_tokens.weight"].numel() * 2
        assert sum(tensor.numel() for tensor in ours.values()) == numel + tied + 2  # two versions

    def test_rows_are_found_by_name(self, made, tmp_path):
        folder, theirs = made
        words = hf_makers.pieces_of(folder)
        shuffled = [words[number] for number in torch.randperm(len(words), generator=torch.manual_seed(3))]
        file = hf_makers.write_dictionary(tmp_path / "dict.txt", shuffled)
        ours = converted(folder, tmp_path / "x.pt", str(file))["encoder.embed_tokens.weight"]
        rows = theirs["model.shared.weight"]
        for number, word in enumerate(shuffled):
            assert torch.equal(ours[4 + number], rows[4 + words.index(word)])
        assert torch.equal(ours[:4], rows[:4])
        assert torch.equal(ours[4 + len(words) :], rows[4 + len(words) :])  # languages, then three tags

    def test_tied_embeddings_are_one_record(self, made, tmp_path):
        convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        state = read_checkpoint(str(tmp_path / "x.pt"))["model"]
        assert state["encoder.embed_tokens.weight"].place == state["decoder.output_projection.weight"].place

    def test_converted_weights_have_the_dtype_asked_for(self, made, tmp_path):
        ours = converted(made[0], tmp_path / "x.pt", dtype=torch.float16)
        theirs = made[1]["model.encoder.layers.1.ffn.experts.expert_5.fc1.weight"]
        assert torch.equal(ours["encoder.layers.1.moe_layer.experts.5.fc1.weight"], theirs.half())

    @pytest.mark.parametrize("key", ["encoder.embed_tokens.weight", "decoder.layers.1.moe_layer.experts.2.fc1.bias"])
    def test_values_beyond_the_dtype_are_no_infinities(self, made, tmp_path, key):
        convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        state = torch.load(tmp_path / "x.pt", weights_only=False)
        state["model"][key][-1] = 1e5
        torch.save(state, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match=f"--dtype must hold the values of {key}, up to 100000, got float16"):
            export_hf(str(tmp_path / "y.pt"), str(tmp_path / "no"), dtype=torch.float16)
        export_hf(str(tmp_path / "y.pt"), str(tmp_path / "hf"), str(tmp_path / "x.dict.txt"), str(made[0]))
        with pytest.raises(CheckpointError, match="model.safetensors: model.* up to 100000, got float16"):
            convert_nllb(str(tmp_path / "hf"), str(tmp_path / "z.pt"), dtype=torch.float16)
        found = converted(tmp_path / "hf", tmp_path / "z.pt", dtype=torch.bfloat16)
        assert found[key].isfinite().all() and not (tmp_path / "no").exists()

    @pytest.mark.parametrize("kind, shards", [("bin", 2), ("bin", 1), ("safetensors", 1)])
    def test_every_layout_gives_the_same_file(self, made, tmp_path, kind, shards):
        hf_makers.write_model(tmp_path / "hf", kind=kind, shards=shards)
        wanted = converted(made[0], tmp_path / "x.pt")
        found = converted(tmp_path / "hf", tmp_path / "y.pt")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    @pytest.mark.parametrize("kind", ["bin", "safetensors"])
    def test_parts_without_an_index_are_read(self, made, tmp_path, kind):
        hf_makers.write_model(tmp_path / "hf", kind=kind, shards=2)
        next((tmp_path / "hf").glob("*.index.json")).unlink()
        wanted, found = converted(made[0], tmp_path / "x.pt"), converted(tmp_path / "hf", tmp_path / "y.pt")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    def test_a_model_without_its_head_has_keys_without_a_prefix(self, made, copy, tmp_path):
        """As transformers' NllbMoeModel is saved."""
        for shard in copy.glob("model-*.safetensors"):
            save_file({key.removeprefix("model."): tensor for key, tensor in load_file(shard).items()}, shard)
        (copy / "model.safetensors.index.json").unlink()
        wanted, found = converted(made[0], tmp_path / "x.pt"), converted(copy, tmp_path / "y.pt")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)

    def test_the_file_is_what_torch_save_writes_with_checksums(self, made, tmp_path):
        done = convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        with zipfile.ZipFile(done.files[0]) as archive:
            assert archive.testzip() is None
            data = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            assert all(entry.CRC and entry.compress_type == zipfile.ZIP_STORED for entry in data)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["x.dict.txt", "x.langs.txt", "x.pt"]

    def test_tokenizer_json_alone_names_the_rows(self, made, copy, tmp_path):
        words = hf_makers.pieces_of(copy)
        vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + row for row, word in enumerate(words)}
        config = json.loads((copy / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        added = [{"content": entry["content"], "id": int(row)} for row, entry in config.items()]
        (copy / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
        for name in ("sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json"):
            (copy / name).unlink()
        found, wanted = converted(copy, tmp_path / "x.pt"), converted(made[0], tmp_path / "y.pt")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


class TestDictionaryChecksum:
    """Of the rows as fairseq's task names them, so that a served checkpoint's dictionary can be compared."""

    def test_the_checkpoint_keeps_it_and_the_language_list(self, made, tmp_path):
        done = convert_nllb(str(made[0]), str(tmp_path / "x.pt"))
        state = read_checkpoint(str(done.files[0]))
        words = [line.rsplit(" ", 1)[0] for line in done.files[1].read_text().splitlines()]
        languages = done.files[2].read_text().split()
        assert state["args"].langs == languages == list(hf_makers.LANGUAGES)
        tags = ["<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>"]
        names = ["<s>", "<pad>", "</s>", "<unk>", *words, *(f"__{code}__" for code in languages), *tags]
        assert state["extra_state"]["dictionary_checksum"] == dictionary_checksum(names)

    @pytest.mark.parametrize("other", [["b", "a"], ["a"], ["ab"], ["a", "b", ""], ["a\\nb"]])
    def test_another_list_has_another_one(self, other):
        assert dictionary_checksum(["a", "b"]) == dictionary_checksum(iter(("a", "b"))) != dictionary_checksum(other)



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


class TestResume:
    def test_a_broken_run_goes_on(self, tmp_path):
        """The last shard's values are damaged; once it is mended, the shards before it are not read again."""
        folder = tmp_path / "hf"
        hf_makers.write_model(folder, kind="bin")
        wanted = converted(folder, tmp_path / "whole.pt")
        *done, last = sorted(folder.glob("*.bin"))
        whole, times = last.read_bytes(), [(file, file.stat().st_mtime_ns) for file in (*done, last)]
        last.write_bytes(whole[: len(whole) // 2] + b"\xff\x00\xff" + whole[len(whole) // 2 + 3 :])
        os.utime(last, ns=(times[-1][1],) * 2)
        with pytest.raises(CheckpointError, match="is damaged"):
            convert_nllb(str(folder), str(tmp_path / "x.pt"))
        assert not (tmp_path / "x.pt").exists() and (tmp_path / "x.pt.partial").exists()
        last.write_bytes(whole)
        for file in done:  # what is read again would show
            tensors = torch.load(file, weights_only=True)
            torch.save({key: torch.zeros_like(tensor) for key, tensor in tensors.items()}, file)
        for file, time_ns in times:
            os.utime(file, ns=(time_ns, time_ns))
        found = converted(folder, tmp_path / "x.pt")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert not list(tmp_path.glob("*.partial*"))

    def test_a_run_of_other_values_begins_anew(self, made, copy, tmp_path):
        file = hf_makers.write_dictionary(tmp_path / "dict.txt", hf_makers.pieces_of(copy)[::-1])
        (tmp_path / "x.pt.partial").write_text("half")
        journal = {"fingerprint": "another", "done": [], "checksums": {}}
        (tmp_path / "x.pt.partial.json").write_text(json.dumps(journal))
        found = converted(copy, tmp_path / "x.pt", str(file))
        wanted = converted(copy, tmp_path / "y.pt", str(file))
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


class TestScript:
    def test_there_and_back_and_errors(self, made, tmp_path, capsys):
        target = str(tmp_path / "x.pt")
        assert main([str(made[0]), "--output", target, "--dtype", "float16"]) == 0
        printed = capsys.readouterr()
        assert printed.out.split() == [str(tmp_path / name) for name in ("x.pt", "x.dict.txt", "x.langs.txt")]
        assert "--add-data-source-prefix-tags" in printed.err
        assert main([str(made[0]), "--output", target]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
        assert main([target, "--to-hf", "--output", str(tmp_path / "back"), "--dtype", "float32"]) == 0
        with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
            assert file.get_slice("model.shared.weight").get_dtype() == "F32"


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
