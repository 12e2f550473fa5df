"""A quantised checkpoint is served bit by bit as its source that is quantised while it is loaded."""

import json

import commands
import pytest
import torch
from buffer_makers import buffered
from quantized_goldens import write_golden
from served_models import EVERY_MODEL, Loader

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.command_line import convert
from fairseq_moe_ext.experts.block_part import BlockPart

INT4 = ("--moe-weights", "int4", "--moe-weights-scope", "all")
DISK = ("--expert-store", "disk")
STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.3")


@pytest.fixture(scope="module")
def loader(shared_goldens):
    return Loader(shared_goldens)


@pytest.fixture(scope="module")
def quantized(shared_goldens, tmp_path_factory):
    """(golden, experts, dense) -> its file, alone in its folder."""
    files = {}

    def find(name, experts="int4", dense="int8"):
        key = name, experts, dense
        if key not in files:
            path = tmp_path_factory.mktemp(name) / "X.safetensors"
            files[key] = write_golden(path, shared_goldens / name / "checkpoint_last.pt", experts, dense, {})
        return files[key]

    return find


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_is_its_source_quantised_while_loading(loader, quantized, name):
    path = quantized(name)
    wanted = loader.logits(name, {}, *INT4)
    for flags in ((), buffered(2), buffered(2, *DISK)):
        assert torch.equal(loader.logits(name, {}, *flags, path=path), wanted)
    assert [file.name for file in path.parent.iterdir()] == ["X.safetensors"]  # it is the store
    assert not torch.equal(loader.logits(name, {}), wanted)


@pytest.mark.parametrize("flags", [
    STATIC,
    pytest.param(("--moe-kernel", "loop"), marks=pytest.mark.slow),
    pytest.param(("--moe-dtype", "float16"), marks=pytest.mark.slow),
])
def test_under_other_flags(loader, quantized, flags):
    wanted = loader.logits("lm_top2", {}, *flags, *INT4)
    assert torch.equal(loader.logits("lm_top2", {}, *flags, path=quantized("lm_top2")), wanted)
    assert torch.equal(loader.logits("lm_top2", {}, *flags, *INT4, path=quantized("lm_top2")), wanted)  # as it says


@pytest.mark.parametrize("experts, dense", [
    ("int8", "float32"), pytest.param("int4", "float16", marks=pytest.mark.slow),
])
def test_dense_layers_as_floats(loader, quantized, experts, dense):
    found = loader.logits("lm_top2", {}, path=quantized("lm_top2", experts, dense))
    wanted = loader.logits("lm_top2", {}, "--moe-weights", experts)
    if dense == "float32":
        assert torch.equal(found, wanted)
    else:
        assert not torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.1)


def test_a_store_in_another_folder_has_the_same_blocks(loader, quantized, tmp_path):
    flags = buffered(2, *DISK, "--expert-store-dir", str(tmp_path))
    for _ in range(2):
        found = loader.logits("lm_top2", {}, *flags, path=quantized("lm_top2"))
        assert torch.equal(found, loader.logits("lm_top2", {}, *INT4))
        assert sum(".int4." in file.name for file in tmp_path.iterdir()) == len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("flags, words", [
    (("--moe-weights", "int8"), r"--moe-weights must be int4 or be left out: .*X\.safetensors is a quantised check"),
    (("--moe-weights", "float"), r"--moe-weights must be int4 or be left out: .*X\.safetensors .*, got float"),
    ((*INT4[:3], "experts"), r"--moe-weights-scope must be all or be left out: .*dense layers in int8, got experts"),
    (
        (*INT4[:2], "--moe-report", "/dev/null", "--moe-report-weight-error", "5"),
        r"--moe-report-weight-error needs the originals, which .*X\.safetensors does not have, got 5",
    ),
    (("--moe-kernel", "grouped-mm"), "--moe-kernel must be auto or loop with experts in int4, got grouped-mm"),
])
@pytest.mark.grouped_mm
def test_a_flag_that_says_otherwise_is_refused(loader, quantized, flags, words):
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        loader.load("lm_top2", {}, *flags, path=quantized("lm_top2"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_scope_that_the_file_has_not_is_refused(loader, quantized):
    path = quantized("lm_top2", "int4", "float16")
    words = "--moe-weights-scope must be experts .* with dense layers in float16, got all"
    with pytest.raises(ValueError, match=f"^{words}"):
        loader.load("lm_top2", {}, *INT4, path=path)
    assert loader.load("lm_top2", {}, *INT4[:2], path=path) is not None


def test_each_rank_reads_its_own_experts(shared_goldens, quantized, tmp_path):
    quick = ("--beam", 1, "--batch-size", 50, "--max-len-b", 3, "--gen-subset", "test", "--cpu", "--num-workers", 0)
    arguments = (shared_goldens / "mt_plain" / "data-bin", "--task", "moe_translation", *quick)
    report = tmp_path / "report.json"
    telling = ("--path", quantized("mt_plain"), "--moe-report", report)
    one = commands.generate(*arguments, *telling)
    alone = json.loads(report.read_text())
    done = commands.run("generate", *arguments, *telling, *buffered(2, *DISK), ranks=2)
    several = json.loads(report.read_text())
    lines = commands.Generation(done.stdout.splitlines())
    assert lines.hypotheses() == one.hypotheses() and several["expert_format"] == alone["expert_format"] == "int4"
    assert several["loading"]["bytes"] < alone["loading"]["bytes"]
    assert sum(each["expert_bytes"] for each in several["ranks"]) == alone["memory"]["expert_bytes_total"]


def damaged(path, target, ending):
    """The file with one bit of the first tensor whose name ends so changed."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    name = next(name for name in header if name.endswith(ending))
    content[start + header[name]["data_offsets"][0] + 5] ^= 4
    target.write_bytes(content)
    return target, name


@pytest.mark.parametrize("ending", [".experts.3.int4", ".q_proj.weight.int8", ".gate.wg.weight"])
def test_a_damaged_block_is_named(loader, quantized, tmp_path, ending):
    path, name = damaged(quantized("lm_top2"), tmp_path / "X.safetensors", ending)
    for flags in ((), buffered(2), buffered(4, *DISK)) if "experts" in ending else ((),):
        with pytest.raises(CheckpointError, match=rf"X\.safetensors: .*{name} is damaged: its checksum must be"):
            loader.load("lm_top2", {}, *flags, path=path)


def test_a_block_of_another_size_is_named(quantized, tmp_path):
    content = quantized("lm_top2").read_bytes()
    dims = b'\\"decoder.layers.1.moe_layer.experts.\\": ['
    assert content.count(dims) == 1
    start = content.index(dims) + len(dims)
    path = tmp_path / "X.safetensors"
    path.write_bytes(content[:start] + b"9" + content[start + 1 :])
    with pytest.raises(CheckpointError, match="a block of shape .* must have .* bytes, decoder.layers.1.moe_layer."):
        read_checkpoint(str(path))


class TestTheToolsKnowIt:
    def test_summary(self, quantized, shared_goldens, capsys):
        path = quantized("mt_nllb_ws2")
        assert convert.main(["summary", str(path)]) == 0
        found = capsys.readouterr().out
        assert convert.main(["summary", str(shared_goldens / "mt_nllb_ws2" / "checkpoint_last.pt")]) == 0
        floats = capsys.readouterr().out
        same = ("architecture", "encoder", "decoder", "experts", "vocabulary")
        told, of_floats = (
            [line for line in text.splitlines() if line.startswith(same)] for text in (found, floats)
        )
        assert told == of_floats and len(told) == len(same)
        (parameters,) = (line for line in found.splitlines() if line.startswith("parameters"))
        assert "int4" in parameters and "int8" in parameters
        (total,) = (line.split()[1] for line in floats.splitlines() if line.startswith("parameters"))
        assert parameters.split()[1] == total
        assert "cc-by-nc-4.0" in found and "5" * 64 in found
        stored = sum({tensor.place: tensor.nbytes for tensor in QuantizedFile(path).tensors().values()}.values())
        assert f"bytes         {stored:,}" in found

    @pytest.mark.parametrize("job", [("merge",), ("split", "--ranks", "2")])
    def test_merge_and_split_refuse(self, quantized, tmp_path, capsys, job):
        assert convert.main([job[0], str(quantized("lm_top2")), str(tmp_path / "Y.pt"), *job[1:]]) == 1
        assert "a quantised checkpoint must stay one file" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_block_is_the_value_that_the_format_says(quantized, shared_goldens):
    model = read_checkpoint(str(quantized("lm_top2")))["model"]
    floats = read_checkpoint(str(shared_goldens / "lm_top2" / "checkpoint_last.pt"))["model"]
    assert set(model) == set(floats)
    for key, tensor in model.items():
        assert tensor.shape == floats[key].shape
        if isinstance(tensor, BlockPart):
            values, wanted = tensor.read(), floats[key].read()
            assert (values - wanted).norm() <= 0.2 * wanted.norm()


def test_fairseqs_own_loader_serves_it(quantized, shared_goldens):
    moe.register()
    from fairseq import checkpoint_utils

    data = str(shared_goldens / "mt_plain" / "data-bin")
    load = checkpoint_utils.load_model_ensemble_and_task
    models, _, _ = load([str(quantized("mt_plain"))], arg_overrides={"data": data})
    assert {layer.experts.format.name for layer in models[0].moe_layers().values()} == {"int4"}
