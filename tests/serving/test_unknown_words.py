"""A line in words that the model does not know is told of, by the commands and from Python."""

import logging

import commands
import pytest
import torch
from fairseq.data import Dictionary

import fairseq_moe_ext as moe
from fairseq_moe_ext.serving.unknown_words import MOST_SHOWN, warn_of_unknown_words

RAW = "Yesterday everybody laughed loudly"
WARNING = f"4 of the 4 words of '{RAW}' are unknown to the model, which reads <unk> for each (such lines: 1 of 2)"


@pytest.fixture
def dictionary():
    found = Dictionary()
    for word in ("\u2581a", "\u2581house"):
        found.add_symbol(word)
    return found


@pytest.mark.parametrize("line, unknown", [
    ("\u2581a \u2581house", None), ("\u2581a Haus", None), ("ein Haus", 2), ("\u2581a gelbes Haus", 2), ("", None),
])
def test_a_line_of_mostly_unknown_words_is_warned_of(dictionary, caplog, line, unknown):
    tokens = [dictionary.encode_line(line, add_if_not_exist=False)]
    warn_of_unknown_words([line], tokens, dictionary)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" are")[0] for text in said] == (
        [] if unknown is None else [f"{unknown} of the {len(line.split())} words of {line!r}"]
    )


def test_a_long_line_is_cut(dictionary, caplog):
    line = "x " * 1000
    warn_of_unknown_words([line], [torch.full((1000,), dictionary.unk())], dictionary)
    (record,) = caplog.records
    assert f"1000 words of {line[:MOST_SHOWN] + '...'!r}" in record.getMessage()


def test_fairseq_interactive_and_load(shared_goldens, caplog):
    folder = shared_goldens / "mt_plain"
    known = "in en \u2581a"
    flags = ("--path", folder / "checkpoint_last.pt", "--task", "moe_translation", "--cpu", "--buffer-size", "2")
    done = commands.run("interactive", folder / "data-bin", *flags, stdin=f"{known}\n{RAW}\n")
    assert done.stderr.count(WARNING) == 1 and WARNING not in done.stdout
    assert done.stdout.count("\nH-") == 2
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", cpu=True) as served:
        with caplog.at_level(logging.WARNING, "fairseq_moe_ext"):
            served.translate([known])
            assert not caplog.records
            served.translate([known, RAW])
    assert [WARNING in record.getMessage() for record in caplog.records] == [True]


def test_a_word_that_was_printed_is_as_unknown_as_before(shared_goldens):
    """With --remove-bpe fairseq adds it to the dictionary, which may be the source's, too: there is no embedding."""
    folder = shared_goldens / "mt_nllb_ws2"
    flags = ("--path", folder / "checkpoint_last.pt", *commands.NLLB, "-t", "de", "--beam", "1", "--buffer-size", "1")
    flags += ("--fixed-dictionary", folder / "data-bin" / "dict.en.txt")  # one for all languages, as NLLB's

    def hypotheses(*lines: str) -> list[str]:
        done = commands.run("interactive", folder / "data-bin", *flags, stdin="\n".join(lines) + "\n")
        return [line.split("\t", 1)[1] for line in done.stdout.splitlines() if line.startswith("H-")]

    first = "\u2581ten \u2581days"
    printed = hypotheses(first)[0].split("\t")[1].split()[0]
    assert hypotheses(first, printed)[1] == hypotheses(printed)[0]
