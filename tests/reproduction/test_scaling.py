"""The modelled steps' rows and findings, and the model beside real ranks."""

from dataclasses import replace

import numpy as np
import pytest

from reproduction.cluster import Device, Network, System, systems
from reproduction.layer_costs import LayerCosts
from reproduction.scaling import draw_scaling, findings, scaling_table
from reproduction.scaling_validation import (
    LayerRequest,
    RankTimes,
    ValidationRow,
    calibrate,
    draw_validation,
    time_ranks,
    validation_section,
)
from reproduction.stacks import LM, Stack
from reproduction.step_model import SHAPES, TOKENS, scale_stack

HERE = Device("here", flops=5e10, memory=1e10, element=4)
COSTS = LayerCosts(HERE, 1024, 4096, (1, 256), (4e-3, 9e-2), 1e-6, 1e-6, 1e-10, 1e-9)


@pytest.fixture
def stack():
    """Every second expert has three quarters of the work, in every batch."""
    loads = np.tile(np.repeat([[9, 3]], 8, axis=0).reshape(1, 16), (12, 1))
    return Stack("language_modeling", LM, "prefill", {"layer": loads}, {"layer": loads})


def test_shapes_are_table_1s():
    assert (SHAPES[LM].experts, SHAPES[LM].moe_layers, SHAPES[LM].fraction) == (512, 12, 0.05)
    assert SHAPES["MT encoder"].moe_layers == 6 and TOKENS["MT decoder"] == 48


def test_rows_of_a_stack(stack, tmp_path):
    known = {**systems(), "here": System("threads", HERE, systems()["paper"].network, ())}
    rows = scale_stack(stack, known, {LM: COSTS}, (8, 32, 1024))
    assert {row.ranks for row in rows} == {8, 32}  # 1,024 outnumber the experts
    assert {(row.ranks, row.nodes) for row in rows} == {(8, 1), (32, 4)}
    for row in rows:
        parts = row.gate_ms + row.move_ms + row.exchange_ms + row.experts_ms + row.rest_ms
        assert row.step_ms == pytest.approx(parts)
    at = {(row.system, row.ranks, row.gating, row.placement): row for row in rows}
    for system in known:
        # 8 ranks hold whole pairs; 32 ranks a busy or an idle half
        assert at[system, 8, "dynamic", "contiguous"].largest_share == pytest.approx(1)
        assert at[system, 32, "dynamic", "contiguous"].largest_share == pytest.approx(1.5)
        assert at[system, 32, "dynamic", "balanced"].largest_share == pytest.approx(1)
        steps = [at[system, 32, *case].step_ms for case in (("dynamic", "balanced"), ("dynamic", "contiguous"))]
        assert steps[0] < steps[1] < at[system, 32, "static", "contiguous"].step_ms
    assert at["today", 8, "dynamic", "balanced"].step_ms < at["paper", 8, "dynamic", "balanced"].step_ms
    text = scaling_table(rows, known)
    assert "LM: maximum throughput over static gating, one node | 6.21x |" in text
    draw_scaling(tmp_path / "s.png", rows)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_findings_follow_their_rules(stack):
    rows = scale_stack(stack, systems(), {LM: COSTS}, (8, 32))
    faster, grows, balance = findings(rows)
    assert faster.holds and balance.holds is False  # no gain on 8 ranks, where contiguous is even
    slow = [replace(row, step_ms=1e9) if row.gating == "dynamic" else row for row in rows]
    assert findings(slow)[0].holds is False
    fewer = [row for row in rows if row.ranks == 8]
    assert findings(fewer)[1].holds is None


def test_gloo_as_a_network():
    network = calibrate(RankTimes([], exchange_small=1e-3 + 1024 / 1e9, exchange_large=1e-3 + (1 << 20) / 1e9))
    assert network.message == pytest.approx(1e-3) and network.nvlink == pytest.approx(1e9)
    assert network.exchange(np.full((3, 3), 1e6)) == pytest.approx(2e-3 + 2e-3)
    assert isinstance(network, Network)


def test_validation_section_shows_measured_and_predicted(tmp_path):
    rows = [ValidationRow("LM", 2, 2, "dynamic", "contiguous", 10.0, 12.0, 9.0),
            ValidationRow("LM", 2, 2, "dynamic", "balanced", 8.0, 6.0, 6.0),
            ValidationRow("LM", 2, 2, "static", "contiguous", 40.0, 11.0, 11.0)]
    text = validation_section(rows)
    assert "| LM | 2 | dynamic | contiguous | 10.0 | 12.0 | +20% | 9.0 |" in text
    assert "median error is 25%" in text and "-72% (static, contiguous, 2 ranks)" in text
    assert "rightly in 2 of 3 pairs" in text
    draw_validation(tmp_path / "v.png", rows)
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_real_ranks():
    """Static gating runs every slot: four times the rows of dynamic, and a mask."""
    rows = [[[128, 64, 32, 32, 0, 0, 0, 0], [0, 0, 0, 32, 32, 64, 64, 64]]]
    requests = [LayerRequest(gating, 256, 1024, 1.0, [0, 1] * 4, rows, 5) for gating in ("dynamic", "static")]
    times = time_ranks(2, requests)
    assert 0 < times.layers[0] < times.layers[1]
    assert 0 < times.exchange_small < times.exchange_large
