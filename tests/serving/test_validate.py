"""fairseq-validate, which loads a checkpoint without a task and computes losses with it."""

import json
import math
import re

import commands
import pytest
import torch
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data
from rank_commands import Told, assert_same_trace, telling

BUFFER = ("--expert-buffer-size", "2", "--expert-store", "disk")


def validate(folder, task, *flags, path="checkpoint_last.pt", **how) -> dict[str, float]:
    """The figures that the command prints at its end."""
    return validate_subsets(folder, task, *flags, path=path, **how)["test"]


def validate_subsets(folder, task, *flags, path="checkpoint_last.pt", **how) -> dict[str, dict[str, float]]:
    """Subset -> the figures that the command prints of it, once."""
    arguments = (folder / "data-bin", "--path", folder / path, "--valid-subset", "test", "--cpu")
    given = ("--task", task, "--batch-size", "8", "--num-workers", "0", *flags)
    done = commands.run("validate", *arguments, *given, **how)
    lines = re.findall(r"\| valid on '(\w+)' subset \| (.*)$", done.stdout + done.stderr, flags=re.MULTILINE)
    assert len(dict(lines)) == len(lines)
    found = {subset: dict(part.split() for part in line.split(" | ")) for subset, line in lines}
    return {subset: {name: float(value) for name, value in figures.items()} for subset, figures in found.items()}


@pytest.fixture(scope="module")
def plain(shared_goldens):
    return validate(shared_goldens / "mt_plain", "moe_translation")


def test_a_buffer_changes_nothing_and_the_report_tells_of_it(shared_goldens, tmp_path, plain):
    told = tmp_path / "report.json"
    found = validate(shared_goldens / "mt_plain", "moe_translation", *BUFFER, "--moe-report", told)
    assert found == plain and plain["moe_gate_loss"] > 0 and math.isfinite(plain["loss"])
    report = json.loads(told.read_text())
    assert report["decoder"]["tokens"] > 1000 and all(layer["misses"] > 0 for layer in report["layers"])


@pytest.mark.slow
def test_a_language_models_buffer(shared_goldens):
    folder = shared_goldens / "lm_top2"
    found = validate(folder, "moe_language_modeling", *BUFFER)
    assert found == validate(folder, "moe_language_modeling") and found["ppl"] == 149.41  # as it was trained


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        (("--moe-dtype", "bfloat16"), 0.02),
        (("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.05", "--batch-size", "8"), 1.0),
        (("--moe-capacity-factor", "0.5"), 1.0),
    ],
)
def test_flags_take_effect(shared_goldens, plain, flags, most):
    """By so much at most: the model is still the same."""
    found = validate(shared_goldens / "mt_plain", "moe_translation", *flags)
    assert 0 < abs(found["loss"] - plain["loss"]) < most * plain["loss"]


def test_a_checkpoint_that_names_no_loss_is_evaluated_by_fairseqs_own(shared_goldens, tmp_path, plain):
    folder = shared_goldens / "mt_plain"
    state = torch.load(folder / "checkpoint_merged.pt", weights_only=False)
    state["cfg"]["criterion"] = None
    torch.save(state, tmp_path / "X.pt")
    found = validate(folder, "moe_translation", path=tmp_path / "X.pt")
    assert found["loss"] == plain["inner_loss"]


def test_a_saved_losss_words_are_read_as_its_numbers_are(shared_goldens, tmp_path, plain):
    """The mean of the layers' gate losses, where the checkpoint's loss says so, in place of their sum."""
    folder = shared_goldens / "mt_plain"
    state = torch.load(folder / "checkpoint_merged.pt", weights_only=False)
    assert state["cfg"]["criterion"]["moe_gate_loss_combine_method"] == "sum"
    state["cfg"]["criterion"]["moe_gate_loss_combine_method"] = "average"
    torch.save(state, tmp_path / "X.pt")
    found = validate(folder, "moe_translation", path=tmp_path / "X.pt")
    assert found["moe_gate_loss"] == pytest.approx(plain["moe_gate_loss"] / 2, abs=2e-3)  # two layers
    assert found["inner_loss"] == plain["inner_loss"]


@pytest.mark.parametrize("pairs", ["en-de,en-fr", "en-fr"])
def test_a_multilingual_model_in_all_its_directions(shared_goldens, pairs):
    flags = ("--langs", "en,de,fr", "--encoder-langtok", "src", "--decoder-langtok", "--lang-pairs", pairs)
    found = validate(shared_goldens / "mt_nllb_ws2", "moe_translation_multi_simple_epoch", *flags)
    assert math.isfinite(found["loss"])


def test_a_dense_checkpoint_has_fairseqs_own_loss(tmp_path, monkeypatch):
    """It is read by the plugin's safe loader; fairseq's own takes no Namespace unless it is told to trust the file."""
    words = ("-s", "en", "-t", "de", "--max-source-positions", "64", "--max-target-positions", "64")
    data = write_data(tmp_path / "data-bin", ("en", "de"), splits={"train": 8, "valid": 8, "test": 16})
    untrained_checkpoint(tmp_path / "X.pt", data, "--task", "translation", "--arch", "transformer_tiny", *words)
    found = validate(tmp_path, "moe_translation", *words, path="X.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    wanted = validate(tmp_path, "translation", *words, path="X.pt", user_dir=None)
    found.pop("wps"), wanted.pop("wps")
    assert found == wanted and found["loss"] > 1


# --- several ranks


def assert_same_figures(found: dict[str, float], wanted: dict[str, float]) -> None:
    """As they are printed, to 3 places; the plugin's sums of floats are of the same numbers in the same order."""
    assert found.keys() == wanted.keys() >= {"loss", "moe_gate_loss"}
    for name, value in wanted.items():
        if name not in ("wps", "all_to_all_cpu_time_ms"):  # times
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1.1e-3), name


@pytest.mark.parametrize(
    ("name", "task", "flags"),
    [
        pytest.param("lm_top2", "moe_language_modeling", (), marks=pytest.mark.slow),
        ("lm_top2", "moe_language_modeling", BUFFER),
        ("mt_plain", "moe_translation", ()),
        pytest.param("mt_plain", "moe_translation", BUFFER, marks=pytest.mark.slow),
        pytest.param(
            "mt_nllb_ws2",
            "moe_translation_multi_simple_epoch",
            ("--langs", "en,de,fr", "--encoder-langtok", "src", "--decoder-langtok", "--lang-pairs", "en-de,en-fr"),
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("by_torchrun", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_several_ranks_find_one_processs_loss(shared_goldens, tmp_path, name, task, flags, by_torchrun):
    one, two = (tmp_path / each for each in ("one", "two"))
    one.mkdir(), two.mkdir()
    wanted = validate(shared_goldens / name, task, *flags, *telling(one))
    how, more = ({"ranks": 2}, ()) if by_torchrun else ({}, ("--distributed-world-size", 2))
    assert_same_figures(validate(shared_goldens / name, task, *flags, *more, *telling(two), **how), wanted)
    found, alone = Told.read(two), Told.read(one)
    assert_same_trace(found, alone)
    assert [rank["rank"] for rank in found.report["ranks"]] == [0, 1]
    assert all(rank["tokens"] > 500 for rank in found.report["ranks"])  # each has worked
    assert found.report["decoder"]["tokens"] == alone.report["decoder"]["tokens"]
    if flags == BUFFER:
        assert all(layer["misses"] > 0 for layer in found.report["layers"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Task -> a folder of an untrained model and its data, valid and test of 5 and 7 sentences."""
    found = {}
    for task, languages, training in (
        ("moe_language_modeling", (), LM_TRAINING),
        ("moe_translation", ("en", "de"), MT_TRAINING),
    ):
        found[task] = folder = tmp_path_factory.mktemp(task)
        data = write_data(folder / "data-bin", languages, splits={"train": 2, "valid": 5, "test": 7})
        untrained_checkpoint(folder / "X.pt", data, *training)
        untrained_checkpoint(folder / "dense.pt", data, *training, "--moe-freq", "0")
    return found


SUBSETS = ("--valid-subset", "test,valid,train", "--batch-size", 2, "--required-batch-size-multiple", 1)


@pytest.mark.parametrize(
    ("task", "path", "ranks"),
    [
        ("moe_translation", "X.pt", 3),  # batches: four, three, one
        pytest.param("moe_language_modeling", "X.pt", 2, marks=pytest.mark.slow),
        pytest.param("moe_translation", "dense.pt", 3, marks=pytest.mark.slow),
        pytest.param("moe_language_modeling", "dense.pt", 2, marks=pytest.mark.slow),
    ],
)
def test_several_ranks_go_on_to_further_subsets(small, tmp_path, task, path, ranks):
    """Their batches are dealt out as one row, so that the numbers in the trace are one process's."""
    one, more = (tmp_path / each for each in ("one", "more"))
    one.mkdir(), more.mkdir()
    telling_of = (lambda _folder: ()) if path == "dense.pt" else telling
    wanted = validate_subsets(small[task], task, *SUBSETS, *telling_of(one), path=path)
    found = validate_subsets(small[task], task, *SUBSETS, *telling_of(more), path=path, ranks=ranks)
    assert found.keys() == wanted.keys() == {"test", "valid", "train"}
    for subset, figures in wanted.items():
        assert found[subset]["loss"] == pytest.approx(figures["loss"], abs=1.1e-3)
        assert found[subset]["bsz"] == figures["bsz"]
    if path == "X.pt":
        assert_same_trace(Told.read(more), Told.read(one))
        assert Told.read(more).report["decoder"] == {
            **Told.read(more).report["decoder"],
            **{name: Told.read(one).report["decoder"][name] for name in ("tokens", "steps")},
        }


@pytest.mark.slow
def test_several_ranks_measure_one_processs_bleu(shared_goldens):
    """A translation within a rank's own batch asks no other rank."""
    flags = ("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}')
    wanted = validate(shared_goldens / "mt_plain", "moe_translation", *flags)
    assert wanted["bleu"] > 1
    assert_same_figures(validate(shared_goldens / "mt_plain", "moe_translation", *flags, ranks=2), wanted)
