"""Idle and hot experts, and what stays from batch to batch, on loads worked out by hand."""

import math

import numpy as np
import pytest

from fairseq_moe_ext.trace import PhaseTrace
from reproduction import activation
from reproduction.activation import Row, findings, hottest, measure, overlap_of_any_two
from reproduction.models import Model
from reproduction.stacks import DECODER, ENCODER, LM, stacks_of


def translation(tmp_path):
    return Model("translation", tmp_path / "model.pt", tmp_path, (), True, 4)


def trace(**loads):
    phases = {}
    for phase, (load, batch) in loads.items():
        name = "encoder.layers.1.moe_layer" if phase == "encoder" else "decoder.layers.1.moe_layer"
        phases[phase] = PhaseTrace((name,), np.array(load, dtype=np.uint16)[:, None], np.array(batch))
    return phases


def test_stacks_of_a_translation_model(tmp_path):
    recorded = trace(encoder=([[1, 1, 0], [0, 2, 0]], [0, 1]), decode=([[1, 0, 0], [0, 1, 0], [0, 0, 2]], [0, 0, 1]))
    encoder, decoder = stacks_of(translation(tmp_path), recorded)
    assert (encoder.kind, encoder.title, encoder.phase) == (ENCODER, ENCODER, "encoder")
    assert decoder.kind == DECODER and decoder.num_experts == 3
    assert [loads.tolist() for loads in decoder.loads(per_step=True)] == [[[1, 0, 0], [0, 1, 0], [0, 0, 2]]]
    assert [loads.tolist() for loads in decoder.loads(per_step=False)] == [[[1, 1, 0], [0, 0, 2]]]


def test_the_hottest_eighth():
    loads = np.zeros((3, 16), dtype=np.int64)
    loads[0, [3, 5, 7]] = 4, 9, 2
    loads[1, 11] = 1  # ties of zero by number
    assert [np.flatnonzero(row).tolist() for row in hottest(loads)] == [[3, 5], [0, 11], []]


def test_overlap_of_any_two_steps_is_the_mean_over_pairs():
    sets = np.random.default_rng(0).random((6, 10)) < 0.4
    shared = total = 0
    for now in range(6):
        for other in range(6):
            if now != other:
                shared += (sets[now] & sets[other]).sum()
                total += sets[now].sum()
    assert overlap_of_any_two(sets) == pytest.approx(shared / total)
    assert math.isnan(overlap_of_any_two(sets[:1]))


def test_a_row_by_hand(tmp_path):
    (stack,) = stacks_of(translation(tmp_path), trace(encoder=([[2, 2, 0, 0], [3, 0, 1, 0]], [0, 1])))
    row = measure(stack, 4)
    assert (row.steps, row.experts, row.assignments_per_expert) == (2, 4, 1.0)
    assert row.idle == 0.5 and row.idle_even == pytest.approx(0.75**4)
    assert row.hottest == pytest.approx((0.5 + 0.75) / 2 * 4)
    assert row.active_stays == 0.5  # expert 0 of 0 and 2
    assert row.hot_stays == row.hot_batches == 1.0 and row.hot_chance == 0.25


def row(stack, kind, batch, idle, hot=0.5):
    return Row("m", stack, kind, 32, batch, 10, 2.0, idle, 0.1, 3.0, 0.9, 0.9, hot, 0.2, hot, 0.2, 0.125)


def test_findings_take_the_papers_batch_and_the_rule():
    rows = [row("LM", LM, 4, 0.3), row("LM", LM, 8, 0.05), row("LM", LM, 16, 0.3),
            row("MT decoder", DECODER, 64, 0.6, hot=0.2), row("MT decoder", DECODER, 128, 0.1)]
    by_words = {finding.says: finding for finding in findings(rows)}
    assert by_words["in the LM nearly all experts are active"].holds
    assert "batch 8" in by_words["in the LM nearly all experts are active"].here
    assert by_words["in the MT decoder about 75% of the experts idle even at batch 96"].holds
    assert by_words["hot experts persist over consecutive batches (LM)"].holds
    assert not by_words["hot experts persist over consecutive batches (MT decoder)"].holds
    assert not any("encoder" in says for says in by_words)


def test_draw_functions_write_pictures(tmp_path):
    rows = [row("LM", LM, 4, 0.3), row("LM", LM, 8, 0.05)]
    (stack,) = stacks_of(translation(tmp_path), trace(encoder=([[2, 2, 0, 0], [3, 0, 1, 0]], [0, 1])))
    activation.draw_shares(tmp_path / "a.png", [(stack, 4)])
    activation.draw_idle(tmp_path / "b.png", rows)
    activation.draw_locality(tmp_path / "c.png", rows)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png", "c.png"))
