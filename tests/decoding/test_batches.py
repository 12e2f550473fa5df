"""Every sentence that goes in comes out, in the batches that fairseq makes of them."""

import shutil

import commands
import pytest
from fairseq import tasks
from fairseq.data import Dictionary, data_utils, indexed_dataset

from fairseq_moe_ext.decoding.generator import keep_every_sentence

FEW = ("--beam", "1", "--max-len-b", "3")  # batches count here, not translations


def first_sentences(folder, number: int, target, name: str = "test.en-de"):
    """A copy of the data folder with only the first `number` sentences."""
    target.mkdir()
    for language in ("en", "de"):
        shutil.copy(folder / f"dict.{language}.txt", target)
        dictionary = Dictionary.load(str(folder / f"dict.{language}.txt"))
        sentences = data_utils.load_indexed_dataset(str(folder / f"{name}.{language}"), dictionary)
        prefix = target / f"{name}.{language}"
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", len(dictionary))
        for i in range(number):
            builder.add_item(sentences[i])
        builder.finalize(f"{prefix}.idx")
    return target


def fairseqs_batches(data, *flags) -> list[list[int]]:
    """The batches of fairseq's own translation task, ids in order."""
    arguments = ("--task", "translation", *commands.BEAM, "--path", "unused.pt", *flags)
    cfg = commands.parse("generate", data, *arguments)
    task = tasks.setup_task(cfg.task)
    task.load_dataset("test")
    batches = task.get_batch_iterator(
        task.dataset("test"),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=(1024, 1024),
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        seed=cfg.common.seed,
    ).next_epoch_itr(shuffle=False)
    return [batch["id"].tolist() for batch in batches]


def served_batches(goldens, data, *flags) -> list[list[int]]:
    """The batches that fairseq-generate served, by the ids it scored."""
    path = ("--path", goldens / "mt_plain" / "checkpoint_merged.pt", "--score-reference")
    return [batch.ids for batch in commands.generate(data, *path, *commands.MT, *flags).batches]


def slow(*flags):
    return pytest.param(flags, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [1, 7, 8, 100])
def test_as_many_sentences_come_out_as_went_in(shared_goldens, tmp_path, number):
    data = first_sentences(shared_goldens / "mt_plain" / "data-bin", number, tmp_path / "data")
    path = ("--path", shared_goldens / "mt_plain" / "checkpoint_merged.pt")
    found = commands.generate(data, *path, *commands.MT, *FEW)
    for kind in "STH":
        assert sorted(sentence for sentence, _ in found.of_kind(kind)) == list(range(number))


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", "36"),
        slow("--batch-size", "24"),
        slow("--max-tokens", "600"),
        ("--max-tokens", "500", "--batch-size", "16"),
        slow("--batch-size", "1"),
        ("--batch-size", "9", "--required-batch-size-multiple", "1"),
        (),
    ],
    ids=" ".join,
)
def test_batches_are_fairseqs_but_for_the_tail(shared_goldens, flags):
    data = shared_goldens / "mt_plain" / "data-bin"
    fairseqs = fairseqs_batches(data, *(flags or ("--max-tokens", "12000")))
    served = served_batches(shared_goldens, data, *flags)
    assert served[: len(fairseqs)] == fairseqs
    tail = served[len(fairseqs) :]
    assert len(tail) <= 1
    assert sorted(sum(served, [])) == list(range(100))


def test_fairseq_loses_the_tail():
    """If this fails, fairseq has mended its batches and `keep_every_sentence` can go."""
    batches = data_utils.batch_by_size(list(range(100)), lambda i: 10, max_sentences=36, required_batch_size_multiple=8)
    assert sum(map(len, batches)) == 96


class CountingDataset:
    """Stands for a dataset: batches of 8, the rest lost as fairseq loses it."""

    def batch_by_size(self, indices, **kwargs):
        return [indices[i : i + 8] for i in range(0, len(indices) // 8 * 8, 8)]


@pytest.mark.parametrize("number", [0, 1, 7, 8, 9, 16, 31])
def test_only_what_was_lost_is_appended(number):
    dataset = CountingDataset()
    before = dataset.batch_by_size(list(range(number)))
    keep_every_sentence(dataset)
    keep_every_sentence(dataset)  # a second call changes nothing
    after = [list(batch) for batch in dataset.batch_by_size(list(range(number)))]
    assert after[: len(before)] == before
    assert sum(after, []) == list(range(number))
    assert len(after) - len(before) == (number % 8 > 0)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow), 7])
def test_language_models_score_every_token(shared_goldens, rows):
    folder = shared_goldens / "lm_top2"
    path = ("--path", folder / "checkpoint_last.pt", "--batch-size", rows)
    found = commands.eval_lm(folder / "data-bin", *path, *commands.LM)
    assert sorted(sum((batch.ids for batch in found.batches), [])) == list(range(118))
    assert sum(len(row) for batch in found.batches for row in batch.scores) == 15035
