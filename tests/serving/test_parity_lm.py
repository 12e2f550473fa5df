"""Language models against upstream's own evaluation: every token's log-probability, the batches, the total loss.

Figures and recordings: made by upstream's own code (fairseq's branches moe and nllb). The tiny models are in
tests/goldens, so that they are tested in every clone; the others are read from ../shared/goldens.
"""

from dataclasses import dataclass, field

import commands
import numpy as np
import pytest

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One recording and the flags that upstream was run with."""

    model: str
    recording: str
    fraction: float
    loss: float  # base 2, the recordings' README's
    batch: tuple = ("--batch-size", "8")
    flags: tuple = ()
    overrides: dict = field(default_factory=dict)
    slow: bool = False

    def param(self):
        return pytest.param(self, id=f"{self.model}-{self.recording}", marks=[pytest.mark.slow] if self.slow else [])


EOS = ("--sample-break-mode", "eos")
SHORT = ("--tokens-per-sample", "16")  # the tiny models' rows
ONE, TWO, SIXTEEN = (("--batch-size", str(rows)) for rows in (1, 2, 16))
TINY_STATIC = [
    Case("tiny_lm_top2", "eval_b8_cap-1.0", -1.0, 1.7952152, flags=SHORT),
    Case("tiny_lm_top2", "eval_b8_cap1.0", 1.0, 1.7972854, flags=SHORT),
    Case("tiny_lm_top2", "eval_b8_cap0.25", 0.25, 1.8087126, flags=SHORT),
    Case(
        "tiny_lm_top2",
        "eval_b8_cap0.25_bpr",
        0.25,
        1.8316774,
        flags=SHORT,
        overrides={"moe_batch_prioritized_routing": True},
    ),
    Case(
        "tiny_lm_top2",
        "eval_b8_cap0.25_normbefore",
        0.25,
        1.8033643,
        flags=SHORT,
        overrides={"moe_normalize_gate_prob_before_dropping": True},
    ),
    Case("tiny_lm_top2", "eval_eos_b8_cap0.25", 0.25, 1.6975915, flags=(*SHORT, *EOS)),
    Case(
        "tiny_lm_top2",
        "eval_eos_b8_cap0.25_padmask",
        0.25,
        1.6584488,
        flags=(*SHORT, *EOS),
        overrides={"use_moe_pad_mask": True},
    ),
    Case("tiny_lm_top1", "eval_b8_cap-1.0", -1.0, 1.8310593, flags=SHORT),
    Case("tiny_lm_top1", "eval_b8_cap1.0", 1.0, 1.8243376, flags=SHORT),
    Case("tiny_lm_top1", "eval_b8_cap0.1", 0.1, 1.8758083, flags=SHORT),
]
STATIC = [
    *TINY_STATIC,
    Case("lm_top2", "eval_b8_cap-1.0", -1.0, 7.2274427, slow=True),
    Case("lm_top2", "eval_b8_cap1.0", 1.0, 7.2231145),
    Case("lm_top2", "eval_b8_cap0.25", 0.25, 7.2274427, slow=True),
    Case("lm_top2", "eval_b8_cap0.05", 0.05, 7.5339174),
    Case("lm_top2", "eval_b1_cap-1.0", -1.0, 7.2297053, ONE, slow=True),
    Case("lm_top2", "eval_b1_cap0.25", 0.25, 7.2297053, ONE, slow=True),
    Case("lm_top2", "eval_b8_cap0.05_bpr", 0.05, 7.4296, overrides={"moe_batch_prioritized_routing": True}),
    Case(
        "lm_top2",
        "eval_b8_cap0.05_normbefore",
        0.05,
        7.5363,
        overrides={"moe_normalize_gate_prob_before_dropping": True},
    ),
    Case("lm_top2", "eval_maxtok2048_cap0.25", 0.25, 7.2273, ("--max-tokens", "2048"), slow=True),
    Case("lm_top2", "eval_eos_b16_cap0.05", 0.05, 7.3187, SIXTEEN, EOS, slow=True),
    Case("lm_top2", "eval_eos_b16_cap0.05_padmask", 0.05, 7.2024, SIXTEEN, EOS, {"use_moe_pad_mask": True}, slow=True),
    Case("lm_top2", "eval_eos_b16_cap0.25", 0.25, 7.2854, SIXTEEN, EOS, slow=True),
    Case("lm_top2", "eval_eos_b2_cap1.0", 1.0, 7.2018, TWO, EOS, slow=True),
    Case("lm_top1", "eval_b8_cap-1.0", -1.0, 7.3743834, slow=True),
    Case("lm_top1", "eval_b8_cap1.0", 1.0, 7.3645797, slow=True),
    Case("lm_top1", "eval_b8_cap0.25", 0.25, 7.3645797, slow=True),
    Case("lm_top1", "eval_b8_cap0.05", 0.05, 7.4239945),
    Case("lm_top1", "eval_b1_cap0.25", 0.25, 7.3647022, ONE),
    Case("lm_top2_ws2", "eval_ws1_b8_cap-1.0", -1.0, 7.4512734, slow=True),
    Case("lm_top2_ws2", "eval_ws1_b8_cap1.0", 1.0, 7.4446363, slow=True),
    Case("lm_top2_ws2", "eval_ws1_b8_cap0.05", 0.05, 7.6267228, slow=True),
    Case("lm_top2_ws2", "eval_ws1_b2_cap1.0", 1.0, 7.4446363, TWO, slow=True),
    Case("lm_top2_ws2", "eval_ws1_b2_cap0.05", 0.05, 7.6280, TWO, slow=True),
]
DYNAMIC = [
    *(case for case in TINY_STATIC if case.fraction == 1.0),
    Case("lm_top2", "eval_b8_cap1.0", 1.0, 7.2231145),
    Case("lm_top2", "eval_eos_b2_cap1.0", 1.0, 7.2018, TWO, EOS, slow=True),
    Case("lm_top1", "eval_b8_cap1.0", 1.0, 7.3645797),
    Case("lm_top2_ws2", "eval_ws1_b8_cap1.0", 1.0, 7.4446363),
    Case("lm_top2_ws2", "eval_ws1_b2_cap1.0", 1.0, 7.4446363, TWO, slow=True),
]


def evaluate(golden_folder, case: Case, *flags) -> commands.Evaluation:
    folder = golden_folder(case.model)
    path = ("--path", folder / "checkpoint_last.pt")
    return commands.eval_lm(
        folder / "data-bin", *path, *commands.LM, *case.batch, *case.flags, *flags, overrides=case.overrides
    )


def recorded_batches(golden_folder, case: Case) -> list[tuple[list[int], list[np.ndarray]]]:
    """Per batch its ids and its rows' log-probabilities without padding."""
    with np.load(golden_folder(case.model) / "golden" / f"{case.recording}.npz") as arrays:
        return [
            (
                arrays[f"b{i}/id"].tolist(),
                [row[target != 1] for row, target in zip(arrays[f"b{i}/scores"], arrays[f"b{i}/target"], strict=True)],
            )
            for i in range(int(arrays["n_batches"]))
        ]


def recorded_loss(golden_folder, case: Case) -> float:
    with np.load(golden_folder(case.model) / "golden" / f"{case.recording}.npz") as arrays:
        return float(arrays["loss_base2"])


def assert_same_batches(found: list[commands.ScoredBatch], wanted: list[tuple[list[int], list[np.ndarray]]]) -> None:
    assert [batch.ids for batch in found] == [ids for ids, _ in wanted]
    for batch, (_, rows) in zip(found, wanted, strict=True):
        for number, scores, recorded in zip(batch.ids, batch.scores, rows, strict=True):
            np.testing.assert_allclose(scores, recorded, rtol=0, atol=TOLERANCE, err_msg=f"sentence {number}")


@pytest.mark.parametrize("case", [case.param() for case in STATIC])
def test_static_gating_equals_upstream_at_every_capacity(golden_folder, case):
    found = evaluate(
        golden_folder, case, "--moe-gating", "static", "--moe-eval-capacity-token-fraction", str(case.fraction)
    )
    assert_same_batches(found.batches, recorded_batches(golden_folder, case))
    assert found.loss == pytest.approx(recorded_loss(golden_folder, case), abs=TOLERANCE)
    assert found.loss == pytest.approx(case.loss, abs=TOLERANCE)


@pytest.mark.parametrize("case", [case.param() for case in DYNAMIC])
def test_dynamic_gating_equals_upstream_where_nothing_drops(golden_folder, case):
    found = evaluate(golden_folder, case)
    assert_same_batches(found.batches, recorded_batches(golden_folder, case))
    assert found.loss == pytest.approx(case.loss, abs=TOLERANCE)


def test_the_checkpoints_own_capacity_counts_where_no_flag_is_given(golden_folder):
    case = Case("lm_top2", "eval_b8_cap-1.0", -1.0, 7.2274427)  # the fraction that this checkpoint was saved with
    found = evaluate(golden_folder, case, "--moe-gating", "static")
    assert_same_batches(found.batches, recorded_batches(golden_folder, case))


def test_a_flag_stands_above_model_overrides_and_those_above_the_checkpoint(golden_folder):
    override = {"overrides": {"moe_eval_capacity_token_fraction": 0.05}}
    overridden = evaluate(
        golden_folder, Case("lm_top1", "eval_b8_cap0.05", 0.05, 7.4239945, **override), "--moe-gating", "static"
    )
    assert overridden.loss == pytest.approx(7.4239945, abs=TOLERANCE)
    flag = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "-1.0")
    flagged = evaluate(golden_folder, Case("lm_top1", "eval_b8_cap-1.0", -1.0, 7.3743834, **override), *flag)
    assert flagged.loss == pytest.approx(7.3743834, abs=TOLERANCE)


@pytest.mark.parametrize("fraction", [pytest.param(1.0, marks=pytest.mark.slow), 0.05])
def test_two_ranks_of_upstream_score_as_one_process_does(golden_folder, fraction):
    case = Case("lm_top2_ws2", f"eval_ws1_b2_cap{fraction}", fraction, 0.0, TWO)
    found = evaluate(
        golden_folder, case, "--moe-gating", "static", "--moe-eval-capacity-token-fraction", str(fraction)
    ).by_id()
    for rank in (0, 1):
        recording = Case("lm_top2_ws2", f"eval_ws2_b2_cap{fraction}.rank{rank}", fraction, 0.0)
        for ids, rows in recorded_batches(golden_folder, recording):
            for number, row in zip(ids, rows, strict=True):
                np.testing.assert_allclose(found[number], row, rtol=0, atol=TOLERANCE, err_msg=f"sentence {number}")
