"""A quantised checkpoint that holds a pair's experts alone: what is in it, and that it is served as the whole file."""

import json

import commands
import kept_makers
import pytest
import torch
from buffer_makers import buffered
from checkpoint_makers import split
from kept_makers import load, logits, write_sets
from quantized_sources import assert_holds, quantize, random_state, wanted_tensors

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.command_line import convert, plan

SETS = {"en": (0, 1, 2, 5), "de": (3, 4, 6), "fr": (2, 3, 6, 7)}
KEPT = {"encoder.layers.1.moe_layer": (0, 1, 2), "decoder.layers.1.moe_layer": (0, 2)}


@pytest.fixture
def made(golden_folder, tmp_path):
    """(model, more options) -> the file of its kept experts."""

    def make(name, *more, output="X"):
        folder, file = golden_folder(name), tmp_path / f"{output}.safetensors"
        sets = write_sets(tmp_path / "experts.json", SETS)
        options = ("--data", str(folder / "data-bin"), "--keep", sets, "--pair", "en-de", *more)
        assert quantize(folder / "checkpoint_last.pt", file, *options) == 0
        return file

    return make


def test_holds_the_kept_experts_under_new_numbers_and_cut_gates(tmp_path):
    state = random_state(experts=6)
    torch.save({"args": {"arch": "transformer_lm_gpt"}, "model": state}, tmp_path / "lm.pt")
    sets = write_sets(tmp_path / "experts.json", {"": (1, 3, 4, 6, 11)})
    assert quantize(tmp_path / "lm.pt", tmp_path / "X.safetensors", "--keep", sets) == 0
    layers = {"decoder.layers.0": (1, 3, 4), "decoder.layers.1": (0, 5)}
    opened = assert_holds(tmp_path / "X.safetensors", wanted_tensors(kept_makers.cut(state, layers), "int4", "int8"))
    assert opened.about.kept.num_experts == 6 and opened.about.kept.languages == ("", "")
    assert opened.about.kept.layers == {f"{name}.moe_layer": numbers for name, numbers in layers.items()}


def test_rank_files_without_a_kept_expert(tmp_path):
    """Of three ranks with two experts of each layer the last has none that is kept."""
    state = random_state(experts=6)
    torch.save({"args": {"arch": "transformer_lm_gpt"}, "model": state}, tmp_path / "lm.pt")
    split(state, 3, tmp_path, template=lambda model: {"args": {"arch": "transformer_lm_gpt"}, "model": model})
    sets = write_sets(tmp_path / "experts.json", {"": (0, 1, 2, 6, 7, 8)})
    for source, output in (("lm.pt", "whole"), ("X.pt", "ranks")):
        assert quantize(tmp_path / source, tmp_path / f"{output}.safetensors", "--keep", sets) == 0
    whole, ranks = (QuantizedFile(tmp_path / f"{output}.safetensors").tensors() for output in ("whole", "ranks"))
    assert whole.keys() == ranks.keys() and all(torch.equal(whole[key], ranks[key]) for key in whole)


@pytest.mark.parametrize("name", ["tiny_mt", "tiny_nllb"])
def test_is_served_as_the_whole_model_with_expert_keep(golden_folder, made, tmp_path, name):
    path = made(name)
    keep = ("--expert-keep", str(tmp_path / "experts.json"))
    wanted = logits(load(golden_folder(name), name, *keep, "--moe-weights", "int4", "--moe-weights-scope", "all"))
    for flags in ((), buffered(1, "--expert-store", "disk")):
        assert torch.equal(logits(load(golden_folder(name), name, *flags, path=path)), wanted)
    whole = tmp_path / "whole.safetensors"
    assert quantize(golden_folder(name) / "checkpoint_last.pt", whole) == 0
    assert torch.equal(logits(load(golden_folder(name), name, *keep, path=whole)), wanted)


def test_is_calibrated_by_a_record_of_the_whole_model(golden_folder, tmp_path):
    folder, name = golden_folder("tiny_nllb"), "tiny_nllb"
    source, record = folder / "checkpoint_last.pt", str(tmp_path / "record.npz")
    data = (folder / "data-bin", "--path", source, *commands.NLLB, "-t", "de")
    commands.run("generate", *data, "--moe-record", record)
    keep = ("--keep", write_sets(tmp_path / "experts.json", SETS), "--pair", "en-de")
    files = {}
    for output, options in (("whole", ()), ("kept", keep), ("plain", keep)):
        files[output] = tmp_path / f"{output}.safetensors"
        calibrate = () if output == "plain" else ("--calibrate", record)
        assert quantize(source, files[output], *calibrate, *options) == 0
    even = {"en": (0, 2, 5, 7), "de": (1, 3, 5, 7)}  # as many of each layer, as a file of fairseq's has them
    pruned = ("--keep", write_sets(tmp_path / "even.json", even), "--pair", "en-de")
    assert convert.main(["merge", str(source), str(tmp_path / "pruned.pt"), *pruned]) == 0
    data = ("--data", str(folder / "data-bin"), "--calibrate", record)
    for given, output, options in ((source, "a", pruned), (tmp_path / "pruned.pt", "b", ())):
        assert quantize(given, tmp_path / f"{output}.safetensors", *data, *options) == 0
    of_whole, of_pruned = (QuantizedFile(tmp_path / f"{output}.safetensors").tensors() for output in ("a", "b"))
    assert all(torch.equal(of_whole[key], of_pruned[key]) for key in of_whole if ".experts." in key)
    kept = ("--expert-keep", keep[1])
    found = logits(load(folder, name, path=files["kept"]))
    assert torch.equal(found, logits(load(folder, name, *kept, path=files["whole"])))
    assert not torch.equal(found, logits(load(folder, name, path=files["plain"])))


def test_says_what_it_is(made, capsys):
    path = made("tiny_nllb")
    assert QuantizedFile(path).about.kept.layers == KEPT
    said = str(summarize(str(path)))
    assert "experts       at most 3 in each MoE layer" in said
    assert "kept          3 of 4 experts of the encoder, for en; 2 of 4 experts of the decoder, for de" in said
    assert plan.main([str(path)]) == 0
    assert "5 experts are kept" in capsys.readouterr().out


def test_is_served_for_its_pair_alone(golden_folder, made):
    path, folder = made("tiny_nllb"), golden_folder("tiny_nllb")
    with pytest.raises(ValueError, match="--target-lang must be de, for which .* holds the experts, got fr"):
        load(folder, "tiny_nllb", "-t", "fr", path=path)
    with pytest.raises(ValueError, match="--expert-keep must be left out: .* holds a pair's experts alone"):
        load(folder, "tiny_nllb", "--expert-keep", str(path.parent / "experts.json"), path=path)
    with moe.load(path, cpu=True) as served:  # without languages: those of the file
        found = served.translate(["w1 w2"], beam=2)
        assert found == served.translate(["w1 w2"], "en", "de", beam=2)
        with pytest.raises(ValueError, match="source_lang and target_lang must be en and de, .* got en and fr"):
            served.translate(["w1 w2"], "en", "fr")


def test_a_later_run_goes_on_with_the_same_pair_alone(golden_folder, made, tmp_path, capsys):
    folder = golden_folder("tiny_nllb")
    sets = write_sets(tmp_path / "experts.json", SETS)
    rank = tmp_path / "checkpoint_last-rank-0.pt"
    content = (folder / rank.name).read_bytes()
    rank.write_bytes(content)
    shared = tmp_path / "checkpoint_last-shared.pt"
    shared.write_bytes((folder / shared.name).read_bytes())
    split = tmp_path / "checkpoint_last.pt"
    options = ("--data", str(folder / "data-bin"), "--keep", sets, "--pair")
    file = tmp_path / "X.safetensors"
    rank.rename(tmp_path / "later")
    assert quantize(split, file, *options, "en-de") == 1  # nothing says how many experts a rank file has
    (tmp_path / "later").rename(rank)
    assert quantize(split, file, *options, "en-de") == 0
    assert file.read_bytes() == made("tiny_nllb", output="Y").read_bytes()


@pytest.mark.parametrize("options, sentence", [
    (("--keep", "FILE", "--pair", "en-es"), "--keep FILE must have the language 'es', it has 'de', 'en', 'fr'"),
    (("--keep", "FILE", "--pair", "en"), "--pair must be two languages such as eng_Latn-fra_Latn, got 'en'"),
    (("--pair", "en-de"), "--pair needs --keep, got en-de without it"),
    (("--keep", "FILE"), "--keep FILE must have the language '', it has 'de', 'en', 'fr'"),
])
def test_refuses_what_cannot_be(golden_folder, tmp_path, capsys, options, sentence):
    sets = write_sets(tmp_path / "experts.json", SETS)
    options = [sets if each == "FILE" else each for each in options]
    assert quantize(golden_folder("tiny_nllb") / "checkpoint_last.pt", tmp_path / "X.safetensors", *options) == 1
    assert capsys.readouterr().err == f"error: {sentence.replace('FILE', sets)}\n"
    assert not (tmp_path / "X.safetensors").exists()


@pytest.mark.parametrize("change", [
    {"languages": "en"}, {"num_experts": 0}, {"layers": {}}, {"layers": {"encoder.layers.1.moe_layer": [0, 0]}},
    {"x": 1},
])
def test_a_header_that_says_something_else_is_refused(made, tmp_path, change):
    path = made("tiny_nllb")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    about = json.loads(head["__metadata__"]["fairseq_moe_ext"])
    about["kept"] |= change
    head["__metadata__"]["fairseq_moe_ext"] = json.dumps(about)
    new = json.dumps(head).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
    with pytest.raises(CheckpointError, match=str(path)):
        QuantizedFile(path)


EVEN = {"en": (0, 2, 3, 4, 5, 6), "de": (1, 2, 3, 4, 6, 7)}


@pytest.mark.parametrize("name", ["tiny_mt", "tiny_nllb"])
@pytest.mark.parametrize("job", [("merge",), ("split", "--ranks", "3")])
def test_convert_writes_a_smaller_checkpoint(golden_folder, tmp_path, capsys, name, job):
    folder, sets = golden_folder(name), write_sets(tmp_path / "experts.json", EVEN)
    (tmp_path / "small").mkdir()
    small = tmp_path / "small" / "small.pt"
    keep = ("--keep", sets, "--pair", "en-de")
    assert convert.main([job[0], str(folder / "checkpoint_last.pt"), str(small), *job[1:], *keep]) == 0
    wanted = logits(load(folder, name, "--expert-keep", sets))
    assert torch.equal(logits(load(folder, name, path=small)), wanted)
    layers = {"encoder.layers.1": (0, 2, 3), "decoder.layers.1": (0, 2, 3)}
    whole = read_checkpoint(str(folder / "checkpoint_last.pt"))["model"]
    cut = kept_makers.cut({key: tensor + 0 for key, tensor in whole.items()}, layers)
    found = read_checkpoint(str(small))["model"]
    assert {key: tensor.tolist() for key, tensor in found.items()} == {key: t.tolist() for key, t in cut.items()}
    assert "kept          3 of 4 experts of the encoder, for en" in str(summarize(str(small)))
    quantized = tmp_path / "X.safetensors"
    assert quantize(small, quantized) == 0  # and says so, too
    int4 = ("--moe-weights", "int4", "--moe-weights-scope", "all")
    assert torch.equal(logits(load(folder, name, path=quantized)), logits(load(folder, name, *int4, path=small)))
    with pytest.raises(ValueError, match="--moe-gating must be dynamic with the experts of a pair alone"):
        load(folder, name, "--moe-gating", "static", path=small)
    if name == "tiny_nllb":
        for path in (small, quantized):
            with pytest.raises(ValueError, match="--target-lang must be de, for which .* holds the experts, got fr"):
                load(folder, name, "-t", "fr", path=path)
    capsys.readouterr()
    assert quantize(small, tmp_path / "Y.safetensors", *keep) == 1
    assert "it holds a pair's experts alone already: --keep needs the whole model" in capsys.readouterr().err


def test_convert_refuses_layers_unlike_each_other(golden_folder, tmp_path, capsys):
    sets = write_sets(tmp_path / "experts.json", SETS)
    source = golden_folder("tiny_nllb") / "checkpoint_last.pt"
    assert convert.main(["merge", str(source), str(tmp_path / "X.pt"), "--keep", sets, "--pair", "en-de"]) == 1
    assert capsys.readouterr().err == (
        f"error: --keep {sets} must keep as many experts of every layer, since a checkpoint of fairseq's has one "
        "moe_expert_count, got 2 to 3: fairseq-moe quantize --keep writes others\n"
    )
    assert not (tmp_path / "X.pt").exists()


def test_interactive_takes_its_languages_from_the_file(made):
    path = made("tiny_nllb")
    command = (path, "--path", path, "--task", "moe_translation_multi_simple_epoch", "--cpu", "--beam", "2")
    alone, named = (
        commands.Generation(commands.run("interactive", *command, *pair, stdin="w1 w2\n").stdout.splitlines())
        for pair in ((), ("-s", "en", "-t", "de"))
    )
    assert len(alone.hypotheses()) == 1 and alone.of_kind("D") == named.of_kind("D")
    refused = commands.run("interactive", *command, "-s", "en", "-t", "fr", stdin="w1 w2\n", check=False)
    assert refused.returncode != 0 and "--target-lang must be de, for which" in refused.stderr


def test_load_keeps_the_experts_of_the_languages_that_it_is_told(golden_folder, tmp_path):
    folder, sets = golden_folder("tiny_nllb"), write_sets(tmp_path / "experts.json", SETS)
    options = {"data": folder / "data-bin", "langs": "en,de,fr", "encoder_langtok": "src", "decoder_langtok": True}
    options |= {"expert_keep": sets, "cpu": True}
    with pytest.raises(ValueError, match="expert_keep needs source_lang and target_lang"):
        moe.load(folder / "checkpoint_last.pt", **options)
    with moe.load(folder / "checkpoint_last.pt", source_lang="en", target_lang="de", **options) as served:
        assert served.translate(["w1 w2"], beam=2)
        with pytest.raises(ValueError, match="source_lang and target_lang must be en and de, .* got en and fr"):
            served.translate(["w1 w2"], target_lang="fr")
