"""Models without experts in int8: fairseq's own classes and ours, no layer left out or bypassed."""

import json
import re

import commands
import pytest
import torch
from data_makers import LM_TRAINING, untrained_checkpoint, write_data
from quantized_sources import quantize
from torch import nn

from fairseq_moe_ext.command_line.plan import main as plan
from fairseq_moe_ext.models.int8_dense import Int8Embedding, Int8Linear, Int8Weight, bytes_in_int8

ALL = ("--moe-weights", "int8", "--moe-weights-scope", "all")
OWN_LM = ("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16")
OWN_LM += ("--decoder-layers", "2", "--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "96")
OWN_LM += ("--decoder-attention-heads", "2")
ADAPTIVE = ("--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "20,30")
TIED_ADAPTIVE = ("--decoder-input-dim", "64", "--decoder-output-dim", "64", "--adaptive-input")
TIED_ADAPTIVE += ("--adaptive-input-cutoff", "20,30", "--tie-adaptive-weights", "--tie-adaptive-proj")
OWN_MT = ("--task", "translation", "--arch", "transformer", "-s", "en", "-t", "de")
for side in ("encoder", "decoder"):
    OWN_MT += (f"--{side}-layers", "2", f"--{side}-embed-dim", "64", f"--{side}-ffn-embed-dim", "96")
    OWN_MT += (f"--{side}-attention-heads", "2")
TRAININGS = {
    "own": OWN_LM,
    "tied": (*OWN_LM, "--share-decoder-input-output-embed", "--decoder-learned-pos"),
    "adaptive": (*OWN_LM, *ADAPTIVE),
    "tied adaptive": (*OWN_LM, *ADAPTIVE, *TIED_ADAPTIVE),
    "ours": (*LM_TRAINING, "--moe-freq", "0"),
    "dense in the experts' place": (*LM_TRAINING, "--alternate-decoder-ffn-embed-dim", "64"),
    "translation": OWN_MT,
    "translation, tied": (*OWN_MT, "--share-all-embeddings", "--encoder-normalize-before"),
    "alignment": (*OWN_MT, "--arch", "transformer_align", "--alignment-layer", "0"),
}


FEW = pytest.mark.parametrize("arguments", ["own", "dense in the experts' place", "translation, tied"], indirect=True)


@pytest.fixture(scope="module", params=TRAININGS)
def arguments(request, tmp_path_factory):
    """(command, its arguments)"""
    folder, training = tmp_path_factory.mktemp("model"), TRAININGS[request.param]
    languages = ("en", "de") if "-s" in training else ()
    data = write_data(folder / "data", languages, splits={"train": 4, "valid": 4, "test": 6})
    untrained_checkpoint(folder / "x.pt", data, *training)
    serving = ("--path", folder / "x.pt", "--gen-subset", "test", *commands.LM[-3:])
    if languages:
        return "generate", data, "--task", "moe_translation", "-s", "en", "-t", "de", *serving
    return "eval_lm", data, "--task", "moe_language_modeling", "--tokens-per-sample", "16", *serving


def said(model):
    """(6, 12, words) log-probabilities of a served model over rows of random tokens, some of them padded."""
    tokens = torch.randint(4, 40, (6, 12), generator=torch.Generator().manual_seed(0))
    tokens[0, 7:] = 1
    model.eval()
    with torch.no_grad():
        inputs = (tokens, tokens.ne(1).sum(1), tokens) if hasattr(model, "encoder") else (tokens,)
        return model.get_normalized_probs(model(*inputs), log_probs=True, sample={"target": tokens})


def test_every_linear_and_embedding_is_in_int8_and_called(arguments):
    floats, found = commands.load(*arguments)[0], commands.load(*arguments, *ALL)[0]
    modules = dict(found.named_modules())
    wanted = {name: module for name, module in floats.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    assert len(wanted) > 10
    for name, module in wanted.items():
        assert type(modules[name]) is (Int8Linear if type(module) is nn.Linear else Int8Embedding)
    assert len({module for module in found.modules() if isinstance(module, Int8Weight)}) == len(
        {module.weight for module in wanted.values()}
    )  # what is tied is tied
    others, exact = (dict(model.named_parameters(remove_duplicate=False)) for model in (found, floats))
    assert all(torch.equal(parameter, exact[name]) for name, parameter in others.items())
    called = set()
    for name in wanted:
        modules[name].register_forward_hook(lambda *_, name=name: called.add(name))
    probabilities, expected = said(found), said(floats)
    assert called == {*wanted}
    assert 0 < (probabilities - expected).norm() < 0.03 * expected.norm()


@FEW
def test_a_file_of_a_quantised_dense_model_is_served_as_its_source(arguments, tmp_path):
    command, data, *rest = arguments
    source = rest[rest.index("--path") + 1]
    assert quantize(source, tmp_path / "X.safetensors") == 0
    served = [value if value != source else tmp_path / "X.safetensors" for value in rest]
    found, wanted = commands.load(command, data, *served)[0], commands.load(*arguments, *ALL)[0]
    assert bytes_in_int8(found) == bytes_in_int8(wanted) > 0
    assert torch.equal(said(found), said(wanted))


@FEW
def test_report_and_log_know_the_bytes(arguments, tmp_path):
    command, *rest = arguments
    model, _ = commands.load(*arguments, *ALL)
    wanted = bytes_in_int8(model)
    flags = ("--max-len-b", 4, "--beam", 2) if command == "generate" else ()
    done = commands.run(command.replace("_", "-"), *rest, *flags, *ALL, "--moe-report", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["memory"]["dense_bytes_int8"] == wanted > 0
    assert done.stderr.count("all dense layers lie in int8 (") == 1


@FEW
@pytest.mark.parametrize("flags, words", [
    (("--moe-weights", "int8"), "--moe-weights int8 needs --moe-weights-scope all with a dense model, got ex"),
    (("--moe-weights", "int4", *ALL[2:]), "--moe-weights must be int8 with a dense model, .* fewer bits, got int4"),
])
def test_what_a_dense_model_cannot_obey(arguments, flags, words, capsys):
    with pytest.raises(ValueError, match=f"^{words}"):
        commands.load(*arguments, *flags)
    assert plan([str(arguments[arguments.index("--path") + 1]), "--device-memory", "8G", *flags]) == 1
    assert re.search(words, capsys.readouterr().err)


@FEW
def test_plan_counts_them(arguments, capsys):
    file = str(arguments[arguments.index("--path") + 1])
    needed = [plan([file, "--device-memory", "8G", *flags]) for flags in ((), ALL)]
    assert needed == [0, 0] and "--moe-weights int8 --moe-weights-scope all" in capsys.readouterr().out
