"""`fairseq_moe_ext.load`: the commands' results from a Python program."""

import sys

import commands
import numpy as np
import processes
import pytest

import fairseq_moe_ext as moe
from fairseq_moe_ext.serving.keyword_options import OptionError
from fairseq_moe_ext.serving.served import ClosedError

PIECES = {"post_process": "sentencepiece", "cpu": True}


def source_pieces(served) -> list[str]:
    """The recorded test set's sources, in the words of the dictionary."""
    task = served._parts.task
    task.load_dataset("test")
    sources = task.dataset("test").src
    return [task.source_dictionary.string(sources[number][sources[number] > 2]) for number in range(len(sources))]


@pytest.fixture(scope="module")
def bilingual(shared_goldens):
    folder = shared_goldens / "mt_plain"
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **PIECES) as served:
        yield served


@pytest.fixture(scope="module")
def lines(bilingual):
    return source_pieces(bilingual)[:12]


@pytest.fixture(scope="module")
def command(shared_goldens, lines):
    """fairseq-interactive of these lines, with more of its options."""

    def run(*options: str) -> commands.Generation:
        folder = shared_goldens / "mt_plain"
        arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--cpu", "--task", "moe_translation")
        text = "\n".join(lines) + "\n"
        more = ("--remove-bpe", "sentencepiece", "--buffer-size", "100", *options)
        done = commands.run("interactive", *arguments, *more, stdin=text)
        return commands.Generation(done.stdout.splitlines())

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


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"beem": 4}, "beem must be an option of fairseq's commands or of this plugin, and is not; did you mean beam"),
        ({"input": "file"}, "input must not be given: it has an effect in fairseq's commands alone"),
        ({"moe_gating": "dense"}, "moe_gating invalid choice: 'dense'"),
        ({"beam": "four"}, "beam invalid int value: 'four'"),
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"nbest": 7, "beam": 4}, "nbest must be at most beam, 4, got 7"),
        ({"langs": "en,de"}, "langs must go with a model of moe_translation_multi_simple_epoch"),
        ({"tokens_per_sample": 9}, "tokens_per_sample must go with a model of moe_language_modeling"),
        ({"cpu": 1}, "cpu must be True or False, got 1"),
        ({"sentencepiece_model": "x"}, "sentencepiece_model must go with the bpe or the tokenizer whose option it is"),
        ({"bpe": "letters"}, "bpe must be one of .*, got 'letters'"),
        ({"expert_bufer_size": 3}, "did you mean expert_buffer_size"),
        ({"model_overrides": "{"}, "model_overrides must be a mapping of the checkpoint's fields, got '{'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(shared_goldens, call, words):
    folder = shared_goldens / "mt_plain"
    with pytest.raises(OptionError, match=words):
        moe.load(folder / "checkpoint_merged.pt", data=folder / "data-bin", **call)


def test_options_of_loading_are_refused_in_a_call(bilingual):
    with pytest.raises(OptionError, match="moe_gating must be given to load"):
        bilingual.translate(["a"], moe_gating="static")
    with pytest.raises(OptionError, match="nbest must be 1 for translate"):
        bilingual.translate(["a"], nbest=2)
    with pytest.raises(TypeError, match="must be a list of strings, got the string 'a'"):
        bilingual.translate("a")
    with pytest.raises(TypeError, match="must be strings, got int as number 1"):
        bilingual.translate(["a", 1])


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
