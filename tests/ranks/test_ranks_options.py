"""Several ranks with less common models and options: each result is one rank's."""

import re

import commands
import numpy as np
import pytest
from data_makers import MT_TRAINING, untrained_checkpoint, write_data
from rank_commands import arguments_of, assert_same_lines, assert_translated_once, loss_of
from ties import assert_same_generation

pytestmark = pytest.mark.slow
SHORT = ("--batch-size", 36, "--max-len-b", 10)


def test_a_dense_model(tmp_path):
    """No layer needs the other ranks; each translates its share all the same."""
    data = write_data(tmp_path / "data", ("en", "de"))
    untrained_checkpoint(tmp_path / "dense.pt", data, *MT_TRAINING, "--moe-freq", "0")
    flags = ("--task", "moe_translation", "--gen-subset", "test", "--beam", "2", "--max-len-b", "9", "--cpu")
    arguments = (data, "--path", tmp_path / "dense.pt", *flags, "--batch-size", "3", "--num-workers", "0")
    wanted = commands.generate(*arguments)
    done = commands.run("generate", *arguments, ranks=3)
    found = commands.Generation(done.stdout.splitlines())
    assert len(found.hypotheses()) == 20
    assert_same_generation(found, wanted)
    assert_translated_once(done, sentences=20)


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-workers", "1"),  # fairseq's default
        ("--num-workers", "2", "--data-buffer-size", "3", "--max-tokens", "300"),
        ("--print-alignment",),
        ("--diverse-beam-groups", "2"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_options_of_generation(shared_goldens, flags):
    arguments = arguments_of(shared_goldens, "mt_plain", *SHORT, *flags)
    wanted = commands.run("generate", *arguments)
    done = commands.run("generate", *arguments, ranks=2)
    assert_same_lines(done.stdout, commands.Generation(wanted.stdout.splitlines()))
    assert_translated_once(done)


def test_an_ensemble(shared_goldens):
    """Two models in one process, each with layers of its own."""
    path = shared_goldens / "mt_plain" / "checkpoint_last.pt"
    arguments = arguments_of(shared_goldens, "mt_plain", "--path", f"{path}:{path}", *SHORT)
    wanted = commands.generate(*arguments)
    done = commands.run("generate", *arguments, ranks=3)
    assert_same_lines(done.stdout, wanted)
    assert_translated_once(done)


def test_quiet_prints_the_last_line_alone(shared_goldens):
    done = commands.run("generate", *arguments_of(shared_goldens, "mt_plain", "--quiet", "--batch-size", 36), ranks=2)
    assert re.fullmatch(r"Generate test with beam=4: BLEU = 20\.62 .*\n", done.stdout)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (3, ("--batch-size", "64")),  # two batches
        (2, ("--max-tokens", "2048")),
        (2, ("--sample-break-mode", "eos", "--batch-size", "16")),
        (2, ("--context-window", "16", "--batch-size", "8")),
        (3, ("--context-window", "16", "--batch-size", "15")),  # as many batches for each rank
        (3, ("--batch-size", "16", "--moe-gating", "static", "--moe-eval-capacity-token-fraction", "1.0")),
        (2, ("--num-workers", "1", "--batch-size", "8")),
    ],
    ids=str,
)
def test_options_of_scoring(shared_goldens, ranks, flags):
    arguments = arguments_of(shared_goldens, "lm_top2_ws2", *flags)
    alone, told = (commands.run("eval-lm", *arguments, ranks=number) for number in (None, ranks))
    assert loss_of(told) == loss_of(alone)


def test_words_and_their_probabilities_are_printed_once(shared_goldens):
    arguments = arguments_of(shared_goldens, "lm_top2_ws2", "--batch-size", 8, "--output-word-probs")
    alone, told = (commands.run("eval-lm", *arguments, ranks=ranks) for ranks in (None, 2))
    scored = re.compile(r"\[-?\d+\.\d+\]")
    lines = [[line for line in done.stderr.splitlines() if scored.search(line)] for done in (alone, told)]
    assert len(lines[0]) == len(lines[1]) > 100
    words = [[re.sub(r" \[[^]]*\]", "", line) for line in each] for each in lines]
    assert words[0] == words[1]
    scores = [[float(number) for line in each for number in re.findall(r"\[(-?\d+\.\d+)\]", line)] for each in lines]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=2e-5)
