"""Translation models against upstream's own scores and translations.

Figures and recordings: made by upstream's own code (fairseq's branches moe and nllb). The tiny models are in
tests/goldens, so that they are tested in every clone; the others are read from ../shared/goldens.
"""

import commands
import numpy as np
import pytest
import torch
from fairseq.sequence_scorer import SequenceScorer
from ties import assert_same_generation

SCORES = [  # model, recording, fraction, use_moe_pad_mask, mean log-probability where the README has it
    ("tiny_mt", "tf_en-de_cap1.0_b8_padmask", 1.0, True, None),
    ("tiny_mt", "tf_en-de_cap0.2_b8_padmask", 0.2, True, None),
    ("tiny_nllb", "tf_en-de_cap1.0_b8_nopadmask", 1.0, False, None),
    ("tiny_nllb", "tf_en-de_cap0.2_b8_padmask", 0.2, True, None),
    ("tiny_nllb", "tf_en-fr_cap1.0_b8_nopadmask", 1.0, False, None),
    ("mt_plain", "tf_en-de_cap1.0_b36_padmask", 1.0, True, -2.7290883),
    ("mt_plain", "tf_en-de_cap1.0_b8_padmask_moe", 1.0, True, None),
    ("mt_plain", "tf_en-de_cap0.1_b36_padmask", 0.1, True, None),
    ("mt_plain", "tf_en-de_cap0.1_b36_nopadmask", 0.1, False, None),
    ("mt_plain", "tf_en-de_cap0.1_b8_padmask_moe", 0.1, True, None),
    ("mt_nllb_ws2", "tf_en-de_cap1.0_b36_padmask", 1.0, True, -2.5429764),
    ("mt_nllb_ws2", "tf_en-de_cap1.0_b36_nopadmask", 1.0, False, -2.5429764),
    ("mt_nllb_ws2", "tf_en-de_cap1.0_b8_nopadmask_moe", 1.0, False, None),
    ("mt_nllb_ws2", "tf_en-de_cap-1.0_b36_padmask", -1.0, True, None),
    ("mt_nllb_ws2", "tf_en-de_cap0.1_b36_padmask", 0.1, True, -2.5654273),
    ("mt_nllb_ws2", "tf_en-de_cap0.1_b36_nopadmask", 0.1, False, -2.5798938),
    ("mt_nllb_ws2", "tf_en-de_cap0.1_b8_padmask_moe", 0.1, True, None),
    ("mt_nllb_ws2", "tf_en-fr_cap1.0_b36_nopadmask", 1.0, False, -1.9202392),
]
WITHOUT_DROPS = [case for case in SCORES if case[2] == 1.0]
GENERATIONS = [  # model, target, rows of a batch, recording
    ("tiny_mt", "de", 8, "gen_en-de_cap1.0_b8.txt"),
    ("tiny_nllb", "de", 8, "gen_en-de_cap1.0_b8.txt"),
    ("tiny_nllb", "fr", 8, "gen_en-fr_cap1.0_b8.txt"),
    ("mt_plain", "de", 36, "gen_en-de_cap1.0_b36.txt"),
    ("mt_nllb_ws2", "de", 36, "gen_en-de_cap1.0_b36.rank0.txt"),
    pytest.param("mt_nllb_ws2", "fr", 36, "gen_en-fr_cap1.0_b36.rank0.txt", marks=pytest.mark.slow),
    pytest.param("mt_plain", "de", 1, "gen_en-de_cap1.0_b1.txt", marks=pytest.mark.slow),
    pytest.param("mt_nllb_ws2", "de", 1, "gen_en-de_cap1.0_b1.rank0.txt", marks=pytest.mark.slow),
]
STATIC_FLAGS = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction")


WORDS = ("--remove-bpe", "none", "--nbest", 2)  # the tiny models have no pieces of words; two hypotheses are recorded


def flags_of(model: str, target: str) -> tuple:
    flags = (*commands.NLLB, "-t", target) if "nllb" in model else commands.MT
    return (*flags, *WORDS) if model.startswith("tiny_") else flags


def hypotheses_of(model: str) -> int:
    """How many are recorded."""
    return 80 if model.startswith("tiny_") else 100


def assert_scores_as_recorded(golden_folder, model, recording, pad_mask, mean, *flags) -> None:
    """Feed the recorded batches to the served model by fairseq's SequenceScorer, as --score-reference does."""
    folder = golden_folder(model)
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *flags_of(model, recording[6:8]))
    served, task = commands.load("generate", *arguments, *flags, overrides={"use_moe_pad_mask": pad_mask})
    scorer = SequenceScorer(task.target_dictionary)
    total = tokens = 0
    with np.load(folder / "golden" / f"{recording}.npz") as arrays:
        for i in range(int(arrays["n_batches"])):
            batch = {
                name: torch.from_numpy(arrays[f"b{i}/{name}"]).long()
                for name in ("src_tokens", "src_lengths", "prev_output_tokens", "target")
            }
            target = batch.pop("target")
            found = scorer.generate([served], {"net_input": batch, "target": target})
            for row, hypotheses in enumerate(found):
                wanted = arrays[f"b{i}/scores"][row][target[row].ne(1).numpy()]
                scores = hypotheses[0]["positional_scores"].numpy()
                np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-4, err_msg=f"batch {i}, row {row}")
                total, tokens = total + scores.sum(dtype=np.float64), tokens + len(scores)
    assert tokens > (300 if model.startswith("tiny_") else 1000)
    if mean is not None:
        assert total / tokens == pytest.approx(mean, abs=1e-5)


def generated(golden_folder, model, target, rows, *flags) -> commands.Generation:
    folder = golden_folder(model)
    overrides = commands.NLLB_OVERRIDES if "nllb" in model else {}
    path = ("--path", folder / "checkpoint_last.pt", "--batch-size", rows)
    return commands.generate(folder / "data-bin", *path, *flags_of(model, target), *flags, overrides=overrides)


@pytest.mark.parametrize(
    ("model", "recording", "fraction", "pad_mask", "mean"),
    [pytest.param(*case, marks=pytest.mark.slow) if case[2] == 1.0 and "b36" in case[1] else case for case in SCORES],
)
def test_static_scores_equal_upstream_at_every_capacity(golden_folder, model, recording, fraction, pad_mask, mean):
    assert_scores_as_recorded(golden_folder, model, recording, pad_mask, mean, *STATIC_FLAGS, fraction)


@pytest.mark.parametrize(
    ("model", "recording", "fraction", "pad_mask", "mean"),
    [
        pytest.param(*case, marks=pytest.mark.slow) if "nllb" in case[0] and "de_cap1.0_b36" in case[1] else case
        for case in WITHOUT_DROPS
    ],
)
def test_dynamic_scores_equal_upstream_where_nothing_drops(golden_folder, model, recording, fraction, pad_mask, mean):
    assert_scores_as_recorded(golden_folder, model, recording, pad_mask, mean)


@pytest.mark.parametrize(("model", "target", "rows", "recording"), GENERATIONS)
def test_dynamic_translations_equal_upstream(golden_folder, model, target, rows, recording):
    recorded = commands.read_generation(golden_folder(model) / "golden" / recording)
    found = generated(golden_folder, model, target, rows)
    assert len(found.of_kind("H")) == hypotheses_of(model)
    assert_same_generation(found, recorded)


@pytest.mark.parametrize(
    ("model", "target", "rows", "recording"),
    [GENERATIONS[0], pytest.param(*GENERATIONS[1], marks=pytest.mark.slow), *GENERATIONS[2:]],
)
def test_static_translations_equal_upstream_where_nothing_drops(golden_folder, model, target, rows, recording):
    recorded = commands.read_generation(golden_folder(model) / "golden" / recording)
    found = generated(golden_folder, model, target, rows, *STATIC_FLAGS, "1.0")
    assert len(found.of_kind("H")) == hypotheses_of(model)
    assert_same_generation(found, recorded)
