"""The buffer's tables and rules, on made rows and on a small trace."""

from dataclasses import replace

import numpy as np
import pytest

from fairseq_moe_ext.buffering.simulation import MIN
from fairseq_moe_ext.trace import PhaseTrace
from reproduction import buffering
from reproduction.buffer_rows import RULES, ServedRow, SimulatedRow, simulate_one_rank, simulate_ranks
from reproduction.buffering import misses_table, ranks_table, served_table
from reproduction.models import Model

NAME = "decoder.layers.1.moe_layer"


@pytest.fixture
def recorded(tmp_path):
    """A language model of 8 experts, 12 batches, of which four experts in eight are active."""
    generator = np.random.default_rng(0)
    load = generator.integers(1, 5, (12, 1, 8)) * (generator.random((12, 1, 8)) < 0.5)
    model = Model("language_modeling", tmp_path / "model.pt", tmp_path, (), False, 2)
    return model, {"prefill": PhaseTrace((NAME,), load.astype(np.uint8), np.arange(12))}


def test_one_rank_and_several(recorded):
    model, trace = recorded
    alone = [SimulatedRow(**row) for row in simulate_one_rank(model, trace, 2, 4)]
    active = int((trace["prefill"].load > 0).sum())
    assert {row.accesses for row in alone} == {active}
    assert {row.misses for row in alone if row.size == 8} == {0}
    least = {(row.size, row.order): row.misses for row in alone if row.policy == MIN}
    assert all(row.misses >= least[row.size, row.order] for row in alone)
    shared = [SimulatedRow(**row) for row in simulate_ranks(model, trace, 2, 2)]
    assert {(row.placement, row.experts) for row in shared} == {("contiguous", 4), ("balanced", 4)}
    assert all(row.worst_misses <= row.misses <= 2 * row.worst_misses for row in shared)
    # of six batches of the second half; two ranks' calls of a round count an expert once
    assert max(row.accesses for row in shared) <= int((trace["prefill"].load[6:] > 0).sum())
    assert simulate_ranks(model, trace, 2, 9) == []
    assert "| LM | 2 | 2 of 8 | ascending |" in misses_table(alone)
    assert ranks_table(shared).count("| 2 of 4 |") == 2 * len(RULES)


def simulated(size, policy, misses, placement="contiguous", ranks=1):
    return SimulatedRow("m", "LM", "LM", 8, ranks, placement, 4, size, "ascending", policy, 100, misses, misses)


def findings_of(lifo, fifo, balanced, least):
    alone = [simulated(size, policy, count) for policy, counts in (("lifo", lifo), ("fifo", fifo))
             for size, count in enumerate(counts, 1)]
    shared = [simulated(1, "lifo", lifo[0], ranks=2), simulated(1, MIN, least, ranks=2),
              simulated(1, "lifo", balanced, "balanced", 2), simulated(1, MIN, least, "balanced", 2)]
    return {each.says.split(" (")[0]: each.holds for each in buffering.findings(alone, shared, [])}


def test_findings_follow_their_rules():
    fifo, balanced, near = "LIFO beats FIFO", "balanced placement lowers misses", \
        "LIFO with balanced placement comes very close to MIN"
    assert findings_of((80, 50), (90, 50), 70, 65) == {fifo: True, balanced: True, near: True}
    assert findings_of((80, 50), (70, 90), 80, 60) == {fifo: False, balanced: False, near: False}
    assert not findings_of((80, 50), (90, 60), 79.5, 60)[balanced]  # less than a hundredth


def test_served_rows_and_pictures(recorded, tmp_path):
    whole = ServedRow("m", 8, 4, None, 0, 0, 0, 400, 400, 1000, 10.0, 0.0, "bleu 30.00")
    small = replace(whole, size=1, misses=7, accesses=9, simulated_misses=7, slot_bytes=100, model_bytes=700,
                    batch_ms=25.0, copy_share=0.5)
    text = served_table([whole, small])
    assert "| m | 8 | 1 of 4 | 25% | 70% | 7 of 9 | 7 | 25.0 | 2.50 | 50% | bleu 30.00 |" in text
    (saves,) = buffering.findings([], [], [whole, small])
    assert saves.holds is False and "30.0% with 1 of 4" in saves.here  # the paper's is 32.2%
    model, trace = recorded
    buffering.draw_misses(tmp_path / "a.png", [SimulatedRow(**row) for row in simulate_one_rank(model, trace, 2, 4)])
    buffering.draw_ranks(tmp_path / "b.png", [SimulatedRow(**row) for row in simulate_ranks(model, trace, 2, 2)])
    buffering.draw_served(tmp_path / "c.png", [whole, small])
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png", "c.png"))
