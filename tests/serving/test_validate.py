"""fairseq-validate, which loads a checkpoint without a task and computes losses with it."""

import json
import math

import commands
import pytest
import torch

BUFFER = ("--expert-buffer-size", "2", "--expert-store", "disk")


def validate(folder, task, *flags, path="checkpoint_last.pt") -> dict[str, float]:
    """The figures that the command prints at its end."""
    arguments = (folder / "data-bin", "--path", folder / path, "--valid-subset", "test", "--cpu")
    done = commands.run("validate", *arguments, "--task", task, "--batch-size", "8", "--num-workers", "0", *flags)
    (line,) = [text for text in (done.stdout + done.stderr).splitlines() if "| valid on 'test' subset |" in text]
    parts = line.partition(" subset | ")[2].split(" | ")
    return {name: float(value) for name, value in (part.split() for part in parts)}


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


@pytest.mark.parametrize("pairs", ["en-de,en-fr", "en-fr"])
def test_a_multilingual_model_in_all_its_directions(shared_goldens, pairs):
    flags = ("--langs", "en,de,fr", "--encoder-langtok", "src", "--decoder-langtok", "--lang-pairs", pairs)
    found = validate(shared_goldens / "mt_nllb_ws2", "moe_translation_multi_simple_epoch", *flags)
    assert math.isfinite(found["loss"])
