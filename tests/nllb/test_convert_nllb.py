"""NLLB from Hugging Face's layout and back: every tensor in its place, runs resumed."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import zipfile
from pathlib import Path

import hf_makers
import pytest
import torch
from hf_makers import converted
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
