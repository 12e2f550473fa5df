"""Data that does not fit ends in an error, or is left out where the user asks for that, with its numbers told."""

import json
import re

import commands
import numpy as np
import pytest
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data
from fairseq.data import Dictionary, data_utils

LM = ("--task", "moe_language_modeling", "--gen-subset", "test", *commands.LM[-3:])
MT = ("--task", "moe_translation", "--gen-subset", "test", "-s", "en", "-t", "de", *commands.LM[-3:])
SKIP = "--skip-invalid-size-inputs-valid-test"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A model of 16 positions, and 20 sentences of 4 to 12 tokens."""
    folder = tmp_path_factory.mktemp("lm")
    data = write_data(folder / "data")
    untrained_checkpoint(folder / "x.pt", data, *LM_TRAINING, "--max-target-positions", "16")
    return data, "--path", folder / "x.pt"


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mt")
    data = write_data(folder / "data", ("en", "de"))
    untrained_checkpoint(folder / "x.pt", data, *MT_TRAINING)
    return data, "--path", folder / "x.pt"


def tokens(data) -> int:
    """Of the test split."""
    split = data_utils.load_indexed_dataset(str(data / "test"), Dictionary.load(str(data / "dict.txt")))
    return sum(len(sentence) for sentence in split)


@pytest.mark.parametrize("size", [17, 24])
@pytest.mark.parametrize("flags", [(), (SKIP,), ("--num-shards", "2", "--shard-id", "1")], ids=" ".join)
def test_blocks_longer_than_the_positions_are_an_error_or_told(lm, caplog, size, flags):
    total = tokens(lm[0])
    blocks, rest = -(-total // size), total % size
    assert 0 < rest <= 16
    numbers = f"{blocks - 1} of {blocks} blocks ({total - rest} of {total} tokens)"
    if SKIP in flags:
        found = commands.eval_lm(*lm, *LM, "--tokens-per-sample", size, *flags)
        assert sum(len(row) for row in found.by_id().values()) == rest
        assert f"{numbers} left out" in caplog.text
        return
    with pytest.raises(ValueError, match=re.escape(numbers)) as error:
        commands.eval_lm(*lm, *LM, "--tokens-per-sample", size, *flags)
    assert SKIP in str(error.value) and "16" in str(error.value)


@pytest.mark.parametrize("flags", [(), (SKIP,)], ids=" ".join)
def test_nothing_left_is_an_error(lm, flags):
    total = tokens(lm[0])
    size = next(size for size in range(17, total) if total % size == 0 or total % size > 16)
    with pytest.raises(ValueError, match=rf"nothing is left of {-(-total // size)} blocks \({total} tokens\)"):
        commands.eval_lm(*lm, *LM, "--tokens-per-sample", size, *flags)


def test_a_shard_without_a_batch_is_an_error(lm):
    with pytest.raises(ValueError, match="there must be a batch to serve, got none.*--num-shards"):
        commands.eval_lm(*lm, *LM, "--tokens-per-sample", "16", "--num-shards", "9", "--shard-id", "8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokens-per-sample", "24", "--context-window", "12"), "24.*context-window of 12.*16 positions|24"),
        (("--tokens-per-sample", "16", "--context-window", "16"), "--context-window must be below .*, got 16 and 16"),
        (("--tokens-per-sample", "16", "--max-tokens", "15"), "--max-tokens must be at least .* 16, got 15"),
    ],
)
def test_limits_that_exclude_each_other_are_refused_by_name(lm, flags, message):
    with pytest.raises(ValueError, match=message):
        commands.eval_lm(*lm, *LM, *flags)


def test_a_context_window_does_not_depend_on_the_loaders_processes(lm):
    flags = ("--tokens-per-sample", "16", "--context-window", "8", "--batch-size", "1")
    wanted = commands.eval_lm(*lm, *LM, *flags).by_id()
    found = commands.eval_lm(*lm, *LM, *flags, "--num-workers", "2").by_id()
    assert found.keys() == wanted.keys() and len(wanted) > 4
    for number, row in wanted.items():
        np.testing.assert_array_equal(found[number], row)


@pytest.mark.parametrize("flags", [(), ("--score-reference",)], ids=" ".join)
@pytest.mark.parametrize("side", ["source", "target"])
def test_long_sentences_of_a_translation(mt, caplog, side, flags):
    limits = (f"--max-{side}-positions", "8", *(flags or ("--max-len-b", "5")))
    with pytest.raises(ValueError, match=rf"\d+ of 20 sentences \(.* tokens\) would be left out.*{SKIP}"):
        commands.generate(*mt, *MT, *limits)
    found = commands.generate(*mt, *MT, *limits, SKIP)
    left_out = 20 - len({number for number, _ in found.of_kind("H")})
    assert 0 < left_out < 20 and f"{left_out} of 20 sentences" in caplog.text
    with pytest.raises(ValueError, match="nothing is left of 20 sentences"):
        commands.generate(*mt, *MT, f"--max-{side}-positions", "2", SKIP)


def test_a_sentence_beyond_max_tokens(mt):
    with pytest.raises(ValueError, match="--max-tokens must be at least .* got 5"):
        commands.generate(*mt, *MT, "--max-tokens", "5")


def test_every_sentence_comes_out_in_buckets_of_lengths_too(mt):
    found = commands.generate(*mt, *MT, "--num-batch-buckets", "3", "--max-tokens", "60", "--max-len-b", "5")
    assert sorted(number for number, _ in found.of_kind("H")) == list(range(20))


def test_other_parts_of_the_data_are_told_of(lm, caplog, tmp_path):
    data, *path = lm
    (other := tmp_path / "other").mkdir()
    for file in data.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    commands.eval_lm(f"{data}:{other}", *path, *LM, "--tokens-per-sample", "16")
    assert f"of {data} alone, not of {other}" in caplog.text


def test_two_ranks_refuse_as_one(lm, tmp_path):
    done = commands.run("eval_lm", *lm, *LM, "--tokens-per-sample", "17", ranks=2, check=False)
    assert done.returncode != 0 and SKIP in done.stderr and "Perplexity" not in done.stderr
    flags = ("--moe-report", tmp_path / "report.json")
    done = commands.run("eval_lm", *lm, *LM, "--tokens-per-sample", "17", SKIP, *flags, ranks=2)
    total = tokens(lm[0])
    assert done.stderr.count(f"of {total} tokens) left out") == 1
    assert json.loads((tmp_path / "report.json").read_text())["decoder"]["tokens"] == total % 17


def interactive(mt, *lines: str, check: bool = True):
    flags = ("--task", "moe_translation", "-s", "en", "-t", "de", "--max-source-positions", "4", "--buffer-size", "1")
    flags += ("--cpu", "--beam", "1", "--max-len-b", "5", SKIP)
    return commands.run("interactive", *mt, *flags, stdin="".join(f"{line}\n" for line in lines), check=check)


def test_a_line_that_is_too_long_leaves_the_next_ones_their_turn(mt):
    done = interactive(mt, "w1 w2", "w1 " * 9, "w3")
    assert [line.split("\t")[0] for line in done.stdout.splitlines() if line.startswith("H-")] == ["H-0", "H-2"]
    assert done.stderr.count("nothing is left of 1 sentences") == 1


def test_lines_of_which_none_can_be_served_are_a_failure(mt):
    done = interactive(mt, "w1 " * 9, "w2 " * 9, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: sentences must not be longer than")
