"""fairseq-eval-lm's options on a MoE language model, against scores worked out without fairseq's data sets.

A block's input is the text one token earlier, whatever the break mode (upstream's TokenBlockDataset); an eos comes
before the first.
"""

import logging
import re
import shutil
from collections import defaultdict

import commands
import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, data_utils
from fairseq.data.indexed_dataset import make_builder

EOS = 2
SIZE = 128


@pytest.fixture(scope="module")
def documents(shared_goldens, tmp_path_factory):
    """A data folder whose sentences are the golden's first 240, with an empty line after every few."""
    source, folder = shared_goldens / "lm_top2" / "data-bin", tmp_path_factory.mktemp("documents")
    shutil.copy(source / "dict.txt", folder)
    builder = make_builder(str(folder / "test.bin"), "mmap", vocab_size=1864)
    for number, sentence in enumerate(sentences(source)[:240]):
        builder.add_item(sentence)
        if number % 23 in (0, 5):
            builder.add_item(torch.tensor([EOS]))
    builder.finalize(str(folder / "test.idx"))
    return folder


@pytest.fixture(scope="module")
def model(shared_goldens):
    folder = shared_goldens / "lm_top2"
    return commands.load("eval_lm", folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.LM)[0]


def sentences(folder) -> list[torch.Tensor]:
    """The test split's sentences, each with its eos."""
    data = data_utils.load_indexed_dataset(str(folder / "test"), Dictionary.load(str(folder / "dict.txt")))
    return [torch.as_tensor(data[number]).long() for number in range(len(data))]


def blocks(lengths: list[int], mode: str, size: int = SIZE) -> list[tuple[int, int]]:
    """(first token, one past the last) of every block that `--sample-break-mode` makes of sentences of `lengths`."""
    ends = np.cumsum(lengths).tolist()
    if mode == "none":
        return [(start, min(start + size, ends[-1])) for start in range(0, ends[-1], size)]
    found, start, last = [], 0, 0  # the open block is [start, last)
    for length, end in zip(lengths, ends, strict=True):
        empty = mode == "complete_doc" and length == 1
        if last > start and (mode == "eos" or empty or end - start > size):
            found.append((start, last))
            start = last
        last = end
        if empty:
            start = end
    return [*found, (start, last)] if last > start else found


@torch.no_grad()
def scored(model, text: torch.Tensor, spans: list[tuple[int, int]], context: int = 0) -> dict[int, np.ndarray]:
    """Log-probabilities of every span's tokens, given the span's own past and `context` tokens before it."""
    source = torch.cat((torch.tensor([EOS]), text[:-1]))
    alike = defaultdict(list)
    for number, (start, end) in enumerate(spans):
        alike[end - start, min(context, start)].append(number)
    found = {}
    for (length, before), numbers in alike.items():
        inputs = torch.stack([source[spans[n][0] - before : spans[n][1]] for n in numbers])
        targets = torch.stack([text[spans[n][0] : spans[n][1]] for n in numbers])
        logits = model(inputs)[0][:, -length:]
        scores = logits.log_softmax(dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2).numpy()
        found.update(zip(numbers, scores, strict=True))
    return found


def evaluate(goldens, *flags, data=None) -> commands.Evaluation:
    folder = goldens / "lm_top2"
    path = ("--path", folder / "checkpoint_last.pt", "--batch-size", "8")
    return commands.eval_lm(data or folder / "data-bin", *path, *commands.LM, *flags)


def assert_as_worked_out(found: commands.Evaluation, wanted: dict[int, np.ndarray]) -> None:
    rows = found.by_id()
    assert rows.keys() == wanted.keys()
    for number, row in wanted.items():
        np.testing.assert_allclose(rows[number], row, rtol=0, atol=1e-4, err_msg=f"block {number}")
    mean = np.concatenate(list(wanted.values())).mean(dtype=np.float64)
    assert found.loss == pytest.approx(-mean / np.log(2), abs=1e-4)


@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
def test_break_mode(shared_goldens, documents, model, mode):
    rows = sentences(documents)
    spans = blocks([len(row) for row in rows], mode)
    found = evaluate(shared_goldens, "--sample-break-mode", mode, data=documents)
    assert_as_worked_out(found, scored(model, torch.cat(rows), spans))


def test_the_break_modes_are_four(documents):
    """What the modes make of the same sentences differs, so that the test above tells them apart."""
    lengths = [len(row) for row in sentences(documents)]
    made = [blocks(lengths, mode) for mode in ("none", "complete", "complete_doc", "eos")]
    assert len({tuple(spans) for spans in made}) == 4
    tokens = [sum(end - start for start, end in spans) for spans in made]
    assert tokens == [sum(lengths)] * 2 + [sum(lengths) - lengths.count(1), sum(lengths)]


@pytest.mark.parametrize("window", [16, 100])
def test_context_window(shared_goldens, documents, model, window):
    text = torch.cat(sentences(documents))
    spans = blocks([len(text)], "none", SIZE - window)
    found = evaluate(shared_goldens, "--context-window", window, data=documents)
    assert_as_worked_out(found, scored(model, text, spans, context=window))


@pytest.fixture(scope="module")
def at_once(shared_goldens, documents):
    return evaluate(shared_goldens, data=documents).by_id()


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_softmax_in_batches(shared_goldens, documents, at_once, size):
    found = evaluate(shared_goldens, "--softmax-batch", size, data=documents).by_id()
    assert found.keys() == at_once.keys()
    for number, row in at_once.items():
        np.testing.assert_allclose(found[number], row, rtol=0, atol=1e-5)


def test_output_word_probs(shared_goldens, documents, caplog):
    with caplog.at_level(logging.INFO):
        found = evaluate(shared_goldens, "--output-word-probs", "--output-word-stats", data=documents)
    dictionary = Dictionary.load(str(documents / "dict.txt"))
    rows = sentences(documents)
    text = [dictionary[token] for token in torch.cat(rows).tolist()]
    lines = [record.getMessage() for record in caplog.records if record.name == "fairseq_cli.eval_lm"]
    printed = {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in lines if re.match(r"\d+ \S+ \[-", line)}
    assert printed.keys() == found.by_id().keys()
    for number, scores in found.by_id().items():
        words = [re.fullmatch(r"(\S+) \[(-?[\d.]+)\]", word).groups() for word in printed[number].split("\t")]
        start = number * SIZE
        assert [word for word, _ in words] == text[start : start + len(scores)]
        np.testing.assert_allclose([float(score) for _, score in words], scores, rtol=0, atol=1e-5)
    counted = {line.split("\t")[0]: int(line.split("\t")[1]) for line in lines if line.count("\t") == 5}
    assert counted == {word: text.count(word) for word in set(text)}
