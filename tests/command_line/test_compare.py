"""`fairseq-moe compare` against the commands' own results, and settings that cannot be served or compared."""

from __future__ import annotations

import json
import sys

import commands
import numpy as np
import pytest
import sacrebleu
import torch
from fairseq.sequence_scorer import SequenceScorer
from forked_programs import write_programs
from quantized_goldens import write_golden

from fairseq_moe_ext.command_line.compare import main

BOTH = ("--cpu", "--num-workers", "0")
MT = ("--gen-subset", "test", "--beam", "4", "--batch-size", "16", *BOTH)
LM = ("--gen-subset", "test", "--tokens-per-sample", "16", "--batch-size", "4", *BOTH)
INT4 = ("--moe-weights", "int4", "--moe-weights-scope", "all")


@pytest.fixture(scope="module", autouse=True)
def forks(tmp_path_factory):
    """The settings' processes are forks of one that has imported PyTorch."""
    folder = tmp_path_factory.mktemp("programs") / "bin"
    write_programs(folder)
    before, sys.executable = sys.executable, str(folder / "python")
    yield
    sys.executable = before


class Model:
    """A golden: its path and data, as the arguments have them."""

    def __init__(self, folder):
        self.folder, self.path, self.data = folder, f"{folder}/checkpoint_last.pt", f"{folder}/data-bin"

    def setting(self, *flags: str) -> str:
        return " ".join((self.path, *flags))


@pytest.fixture(scope="module")
def model(golden_folder):
    return lambda name: Model(golden_folder(name))


def compare(capfd, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command and of what it starts."""
    capfd.readouterr()
    try:
        code = main([*map(str, arguments)])
    except SystemExit as end:
        code = end.code
    return code, *capfd.readouterr()


def routed_one_by_one(model: torch.nn.Module, task, dataset) -> dict[str, list[list[int]]]:
    """Per layer what its gate chooses for every token, a sentence at a time."""
    found: dict[str, list] = {name: [] for name in model.moe_layers()}
    hooks = [
        layer.gate.register_forward_hook(
            lambda _gate, _args, routing, name=name: found[name].extend(routing.expert_ids.tolist())
        )
        for name, layer in model.moe_layers().items()
    ]
    scorer = SequenceScorer(task.target_dictionary)
    for number in range(len(dataset)):
        scorer.generate([model], dataset.collater([dataset[number]]))
    for hook in hooks:
        hook.remove()
    return found


def expected(model: Model, common: tuple, flags: tuple) -> dict:
    """Of fairseq-generate's own output and of a sentence at a time, without the code under test."""
    arguments = (model.data, "--path", model.path, *common, *flags)
    texts = commands.generate(*arguments)
    best = {}
    for number, (_, text) in texts.of_kind("D"):
        best.setdefault(number, text)
    references = {number: text for number, (text,) in texts.of_kind("T")}
    hypotheses = [best[number] for number in references]
    references = [list(references.values())]
    scored = commands.generate(*arguments, "--score-reference")
    scores = np.concatenate([row for batch in scored.batches for row in batch.scores])
    served, task = commands.load("generate", *arguments)
    task.load_dataset("test")
    return {
        "best": best,
        "bleu": sacrebleu.corpus_bleu(hypotheses, references).score,
        "chrf++": sacrebleu.corpus_chrf(hypotheses, references, word_order=2).score,
        "length_ratio": len("".join(hypotheses)) / len("".join(references[0])),
        "perplexity": float(np.exp(-scores.mean(dtype=np.float64))),
        "scored_tokens": len(scores),
        "routed": routed_one_by_one(served, task, task.dataset("test")),
        "parameters": sum(each.nbytes for name, each in served.named_parameters() if ".experts." not in name),
    }


@pytest.mark.slow
def test_a_multilingual_model_pair_by_pair_is_the_commands_own_results(model, capfd, tmp_path):
    golden, file = model("tiny_nllb"), tmp_path / "prices.json"
    arguments = (golden.setting(), golden.setting(*INT4), golden.data, "--lang-pairs", "en-de,en-fr", *MT)
    code, out, err = compare(capfd, *arguments, "--json", file)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert found["settings"] == {"A": golden.setting(), "B": golden.setting(*INT4)}
    assert [each["part"] for each in found["parts"]] == ["en-de", "en-fr"]
    for part in found["parts"]:
        multi = tuple(word for word in commands.NLLB if word not in ("--remove-bpe", "sentencepiece"))
        common = (*multi, "-t", part["part"][3:], *MT)
        twins = {"A": expected(golden, common, ()), "B": expected(golden, common, INT4)}
        for name, twin in twins.items():
            for field in ("bleu", "chrf++", "length_ratio", "perplexity", "scored_tokens"):
                assert part[name][field] == pytest.approx(twin[field], rel=1e-6), (part["part"], name, field)
            assert f"{part[name]['bleu']:.2f}" in out and f"{part[name]['chrf++']:.2f}" in out
        a, b = twins["A"], twins["B"]
        assert part["sentences"] == len(a["best"])
        changed = [number for number, text in a["best"].items() if b["best"][number] != text]
        assert part["changed_hypotheses"] == len(changed) / len(a["best"])
        assert [each["layer"] for each in part["routing"]] == list(a["routed"])
        for each in part["routing"]:
            pairs = list(zip(a["routed"][each["layer"]], b["routed"][each["layer"]], strict=True))
            assert each["tokens"] == len(pairs)
            assert each["same_experts"] == pytest.approx(sum({*one} == {*other} for one, other in pairs) / len(pairs))
            assert each["same_first_choice"] == pytest.approx(sum(x[0] == y[0] for x, y in pairs) / len(pairs))
        assert a["parameters"] <= part["A"]["dense_bytes"] < 1.2 * a["parameters"]  # tables of positions beside
        assert part["A"]["expert_format"] == "float" and part["B"]["expert_format"] == "int4"
        assert part["A"]["expert_bytes"] > part["B"]["expert_bytes"] > 0
        assert min(part["A"]["peak_rss_bytes"], part["B"]["decoder_tokens_per_second"]) > 0
    assert any(each["changed_hypotheses"] for each in found["parts"])
    assert {part["A"]["dense_bytes"] == part["B"]["dense_bytes"] for part in found["parts"]} == {False}
    assert min(each["same_experts"] for part in found["parts"] for each in part["routing"]) < 1
    assert out.count("| BLEU ") == 2 and "changed hypotheses |\n" in out.split("en-fr: ")[1]  # both, and an overview
    assert "B, en-fr (4 of 4): fairseq-generate serves\n" in err


def test_a_language_model_under_a_capacity(model, capfd, tmp_path):
    """What a capacity drops is no expert that ran."""
    golden, file = model("tiny_lm_top2"), tmp_path / "prices.json"
    static = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.25")
    code, out, err = compare(capfd, golden.setting(), golden.setting(*static), golden.data, *LM, "--json", file)
    assert code == 0, err
    (part,) = json.loads(file.read_text())["parts"]
    arguments = (golden.data, "--path", golden.path, "--task", "moe_language_modeling", *LM)
    losses = {"A": commands.eval_lm(*arguments).loss, "B": commands.eval_lm(*arguments, *static).loss}
    for name, loss in losses.items():
        assert part[name]["perplexity"] == pytest.approx(2**loss, rel=1e-6)
        assert part[name]["bleu"] is part[name]["encoder_tokens_per_second"] is None
    assert losses["A"] != losses["B"] and "BLEU" not in out and "\n\ntest: " in out
    (layer,) = part["routing"]
    assert layer["tokens"] == part["A"]["scored_tokens"] and 0 < layer["same_experts"] < layer["same_first_choice"] < 1


def test_a_quantised_checkpoint_is_its_source_quantised_while_loading(model, capfd, tmp_path):
    golden, file = model("tiny_mt"), tmp_path / "prices.json"
    quantized = write_golden(tmp_path / "X.safetensors", golden.folder / "checkpoint_last.pt", "int4", "int8", {})
    code, _, err = compare(capfd, golden.setting(*INT4), quantized, golden.data, *MT, "--json", file)
    assert code == 0, err
    (part,) = json.loads(file.read_text())["parts"]
    for field in ("bleu", "chrf++", "perplexity", "length_ratio", "expert_bytes", "dense_bytes", "expert_format"):
        assert part["A"][field] == part["B"][field]
    shares = [share for each in part["routing"] for share in (each["same_experts"], each["same_first_choice"])]
    assert part["changed_hypotheses"] == 0 and shares == [1.0] * 4


@pytest.mark.parametrize(("a", "b", "more", "words"), [
    ("{}", "", (), "error: B must begin with a checkpoint, got ''"),
    ("{}", "{} 'x", (), "error: B must be a checkpoint and flags as a shell reads them"),
    ("{}", "{} --quiet", (), "error: --quiet must not be given, in B or for both: compare reads what"),
    ("{}", "{}", ("--lang-pairs", "en,de"), "error: --lang-pairs must be pairs of languages such as en-de,en-fr, got"),
])  # fmt: skip
def test_wrong_arguments_end_with_2_and_one_sentence(a, b, more, words, model, capfd):
    golden = model("tiny_mt")
    code, out, err = compare(capfd, a.format(golden.path), b.format(golden.path), golden.data, *more)
    assert (code, out) == (2, "") and words in err.splitlines()[-1]


def assert_nothing_was_served(found: tuple[int, str, str], *words: str) -> None:
    code, out, err = found
    assert code == 1 and " serves" not in err and "|" not in out, err
    assert err.splitlines()[-1].startswith("error: ") and all(each in err for each in words), err


def test_a_flag_that_the_command_refuses_ends_before_anything_is_served(model, capfd):
    golden = model("tiny_mt")
    found = compare(capfd, golden.setting(), golden.setting("--moe-weights-scope", "all"), golden.data, *MT)
    assert_nothing_was_served(
        found, "fairseq-generate: error: --moe-weights-scope all needs --moe-weights", "error: B cannot be served"
    )


def test_a_checkpoint_that_is_missing_and_one_of_another_kind(model, capfd, tmp_path):
    golden, lm = model("tiny_mt"), model("tiny_lm_top2")
    found = compare(capfd, golden.setting(), f"{tmp_path}/no.pt", golden.data, *MT)
    assert_nothing_was_served(found, f"{tmp_path}/no.pt", "error: B cannot be served")
    found = compare(capfd, lm.setting(), lm.setting(), lm.data, *LM, "--lang-pairs", "en-de")
    assert_nothing_was_served(found, "--lang-pairs is for a multilingual model", "error: A cannot be served")


def test_other_dictionaries_are_refused(model, capfd, tmp_path):
    golden = model("tiny_nllb")
    words = (golden.folder / "data-bin" / "dict.en.txt").read_text().splitlines()
    other = tmp_path / "dict.txt"
    other.write_text("\n".join([*words[1:], words[0]]) + "\n")
    b = golden.setting("--source-dict", str(other), "--target-dict", str(other))
    found = compare(capfd, golden.setting(), b, golden.data, "-s", "en", "-t", "de", *MT)
    assert_nothing_was_served(found, "error: A and B must have one dictionary, of these checksums, got ")


def test_what_a_gave_is_kept_where_b_fails(model, capfd, tmp_path):
    golden, file = model("tiny_lm_top2"), tmp_path / "prices.json"
    b = golden.setting("--tokens-per-sample", "4096")  # which is found out where the batches are made
    code, out, err = compare(capfd, golden.setting(), b, golden.data, *LM, "--json", file)
    assert code == 1 and "| perplexity " in out
    assert "fairseq-eval-lm: error: blocks must not be longer" in err
    assert err.splitlines()[-1].startswith("error: B cannot be served: fairseq-eval-lm ended with exit code 1")
    (part,) = json.loads(file.read_text())["parts"]
    assert part["A"]["perplexity"] > 1 and "B" not in part


def test_other_references_are_refused(model, capfd):
    golden = model("tiny_mt")
    found = compare(capfd, golden.setting(), golden.setting("--remove-bpe", "letter"), golden.data, *MT)
    assert_nothing_was_served(found, "A and B must make text of tokens alike", "got none, none, none and letter, none")
