"""`fairseq_moe_ext.load`: the commands' results from a Python program."""

import sys

import commands
import numpy as np
import processes
import pytest
import torch
from fairseq import checkpoint_utils
from python_served import PIECES, dense_checkpoint, interactive, lines_of

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.errors import ClosedError
from fairseq_moe_ext.serving.keyword_options import (
    OptionError,
)


@pytest.fixture(scope="module")
def command(shared_goldens, lines):
    def run(*options: str) -> commands.Generation:
        of_model = ("--task", "moe_translation", "--remove-bpe", "sentencepiece")
        return interactive(shared_goldens / "mt_plain", lines, *of_model, *options)

    return run


def assert_as_the_command(found, wanted: commands.Generation, nbest: int = 1) -> None:
    """Texts, scores and every token's score; the command prints the latter with four digits."""
    hypotheses = [each for sentence in found for each in sentence]
    assert [len(sentence) for sentence in found] == [nbest] * len(found)
    assert [each.words for each in hypotheses] == [words for _, words in wanted.hypotheses()]
    assert [each.score for each in hypotheses] == wanted.scores().tolist()
    for each, (_, (scores,)) in zip(hypotheses, wanted.of_kind("P"), strict=True):
        np.testing.assert_allclose(each.positional_scores, [float(part) for part in scores.split()], atol=6e-5)


def test_translations_are_those_of_fairseq_interactive(bilingual, lines, command):
    wanted = command("--beam", "4", "--batch-size", "5")
    assert_as_the_command(bilingual.generate(lines, beam=4, batch_size=5), wanted)
    assert bilingual.translate(lines, beam=4) == [words for _, (_, words) in wanted.of_kind("D")]


def test_an_option_of_a_call_stands_above_that_of_loading(bilingual, lines, command):
    found = bilingual.generate(lines, beam=3, nbest=2, lenpen=0.3, max_len_b=4, max_len_a=0.5)
    wanted = command(*"--beam 3 --nbest 2 --lenpen 0.3 --max-len-b 4 --max-len-a 0.5 --batch-size 32".split())
    assert_as_the_command(found, wanted, nbest=2)
    assert bilingual.translate(lines[:2]) == bilingual.translate(lines[:2], beam=5)


MULTILINGUAL = {"source_lang": "en", "target_lang": "fr", "model_overrides": commands.NLLB_OVERRIDES, **PIECES}


@pytest.mark.slow
def test_a_multilingual_model_takes_its_languages_from_the_checkpoint(shared_goldens):
    folder = shared_goldens / "mt_nllb_ws2"
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **MULTILINGUAL) as served:
        lines = lines_of(served, "test.en-fr.en")[:8]
        found = served.generate(lines, beam=4)
        scored = served.score(lines, [each[0].words for each in found])
    flags = [flag for flag in commands.NLLB if flag not in ("--gen-subset", "test", "--scoring", "sacrebleu")]
    options = (*flags, "-t", "fr", "--batch-size", "32", "--model-overrides", str(commands.NLLB_OVERRIDES))
    assert_as_the_command(found, interactive(folder, lines, *options))
    assert len(scored) == 8


def test_calls_of_a_multilingual_model_name_their_languages(shared_goldens):
    """Each is what a model gives that was loaded for these languages, in any order; a call without gets `load`'s."""
    folder = shared_goldens / "mt_nllb_ws2"
    alone, lines = {}, {}
    for source, target in (("en", "fr"), ("en", "de"), ("fr", "en")):
        languages = {**MULTILINGUAL, "source_lang": source, "target_lang": target}
        with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **languages) as served:
            lines[source] = lines_of(served, "test.en-fr." + source)[:4]
            found = served.generate(lines[source], beam=2)
            alone[source, target] = found, served.score(lines[source], [each[0].words for each in found])
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **MULTILINGUAL) as served:
        for source, target in (("en", "de"), ("fr", "en"), ("en", "fr"), ("en", "de")):
            asked = {"source_lang": source, "target_lang": target}
            found, scored = alone[source, target]
            assert served.generate(lines[source], beam=2, **asked) == found
            words = [each[0].words for each in found]
            assert served.score(lines[source], words, **asked) == scored
        assert served.generate(lines["en"], beam=2) == alone["en", "fr"][0]
        german = [each[0].text for each in alone["en", "de"][0]]
        assert served.translate(lines["en"], beam=2, target_lang="de") == german
        with pytest.raises(OptionError, match="target_lang must be of the model's languages, .*, got 'xx'"):
            served.translate(lines["en"], target_lang="xx")
        with pytest.raises(OptionError, match="source_lang must be a language's name, got 3"):
            served.translate(lines["en"], source_lang=3)
    assert alone["en", "de"] != alone["en", "fr"]


def test_a_bilingual_model_has_no_other_languages(bilingual, lines):
    assert bilingual.translate(lines[:2], target_lang="de") == bilingual.translate(lines[:2])
    with pytest.raises(OptionError, match="target_lang must be of the model's languages, de, got 'fr'"):
        bilingual.translate(lines[:2], target_lang="fr")


@pytest.mark.parametrize("model", ["mt_plain", pytest.param("mt_nllb_ws2", marks=pytest.mark.slow)])
def test_scores_of_translations_are_those_of_score_reference(shared_goldens, model):
    folder = shared_goldens / model
    options, flags = PIECES, commands.MT
    if model == "mt_nllb_ws2":
        options, flags = MULTILINGUAL, (*commands.NLLB, "-t", "fr")
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *flags)
    more = ("--score-reference", "--batch-size", "16")
    wanted = commands.generate(*arguments, *more, overrides=options.get("model_overrides"))
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **options) as served:
        pair, target = ("en-fr", "fr") if model == "mt_nllb_ws2" else ("en-de", "de")
        sources, targets = lines_of(served, f"test.{pair}.en"), lines_of(served, f"test.{pair}.{target}")
        found = served.score(sources, targets, batch_size=16)
        with pytest.raises(ValueError, match="targets must be one translation for each of the 2 sentences, got none"):
            served.score(sources[:2])
    of_command = {number: (float(score), words) for number, (score, words) in wanted.of_kind("H")}
    assert {number: (each.score, each.words) for number, each in enumerate(found)} == of_command


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_scores_of_texts_are_those_of_eval_lm(shared_goldens, gating):
    folder = shared_goldens / "lm_top2_ws2"
    flags, options = ("--moe-gating", gating), {"moe_gating": gating}
    if gating == "static":
        flags += ("--moe-eval-capacity-token-fraction", "0.05")
        options |= {"moe_eval_capacity_token_fraction": 0.05, "tokens_per_sample": 128}
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.LM, "--batch-size", "16")
    wanted = commands.eval_lm(*arguments, "--sample-break-mode", "eos", *flags)
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", cpu=True, **options) as served:
        found = served.score(lines_of(served, "test"), batch_size=16)
        with pytest.raises(ValueError, match="targets must be None for a language model, got 1 texts"):
            served.score(["a"], ["b"])
    by_id = wanted.by_id()
    assert len(found) == len(by_id) > 100
    for number, each in enumerate(found):
        np.testing.assert_array_equal(each.positional_scores, (by_id[number] / np.float32(np.log(2))))
    total = sum(sum(each.positional_scores) for each in found)
    assert -total / sum(len(each.positional_scores) for each in found) == pytest.approx(wanted.loss, rel=1e-5)


def test_continuations_are_those_of_fairseq_interactive(shared_goldens):
    folder = shared_goldens / "lm_top2"
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", cpu=True) as served:
        lines = [" ".join(text.split()[:5]) for text in lines_of(served, "test")[:4]]
        found = served.generate(lines, beam=2, max_len_b=20, max_len_a=0)
        with pytest.raises(OptionError, match="constraints must go with a model of moe_translation, got one of moe_la"):
            served.generate(lines, constraints="ordered")
    options = "--task moe_language_modeling --beam 2 --max-len-a 0 --max-len-b 20 --batch-size 4".split()
    assert_as_the_command(found, interactive(folder, lines, *options))


def test_a_dense_checkpoint_is_served(tmp_path):
    dense_checkpoint(tmp_path / "X.pt")
    with moe.load(tmp_path / "X.pt", data=tmp_path, cpu=True) as served:
        found = served.generate(["w1 w2", "w3"], beam=2, max_len_b=9)
    command = commands.run(
        *"interactive --cpu --task moe_translation --beam 2 --max-len-b 9 --batch-size 2".split(),
        "--buffer-size",
        "2",
        tmp_path,
        "--path",
        tmp_path / "X.pt",
        "-s",
        "en",
        "-t",
        "de",
        stdin="w1 w2\nw3\n",
    )
    assert_as_the_command(found, commands.Generation(command.stdout.splitlines()))
    with pytest.raises(ValueError, match="--expert-buffer-size needs a model with experts, got 2 with a dense one"):
        moe.load(tmp_path / "X.pt", data=tmp_path, cpu=True, expert_buffer_size=2)


def test_nothing_to_translate(bilingual):
    assert bilingual.translate([]) == []
    assert len(bilingual.translate(["", "  "])) == 2


def test_a_closed_model_says_so(shared_goldens):
    folder = shared_goldens / "mt_plain"
    with moe.load(folder / "checkpoint_merged.pt", data=folder / "data-bin", **PIECES) as served:
        served.translate(["a"])
        assert served.report()["generation"]["sentences"] == 1
    served.close()
    for call in (lambda: served.translate(["a"]), served.report, lambda: served.generate([])):
        with pytest.raises(ClosedError, match=r"must be open, got a call of .*checkpoint_merged.pt after its close"):
            call()


def test_importing_the_package_imports_nothing():
    code = "import sys, fairseq_moe_ext as moe; "
    code += "print({'torch', 'numpy', 'fairseq'} & set(sys.modules), 'load' in dir(moe))"
    done = processes.run([sys.executable, "-c", code], cwd=commands.REPOSITORY, fresh=True)
    assert done.stdout.split() == ["set()", "True"], done.stderr


def test_fairseqs_functions_refuse_a_rank_of_torchrun_and_leave_it_as_it_is(shared_goldens, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    hook, path = sys.excepthook, shared_goldens / "mt_plain" / "checkpoint_merged.pt"
    refused = "must be loaded by fairseq's functions in one process, got 2 ranks: fairseq's commands"
    with pytest.raises(ValueError, match=refused):
        checkpoint_utils.load_model_ensemble_and_task([str(path)], {"data": str(path.parent / "data-bin")})
    assert sys.excepthook is hook and not torch.distributed.is_initialized()
