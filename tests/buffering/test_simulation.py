"""The simulator over recorded loads, and its script's table and plot."""

import csv
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

from fairseq_moe_ext.balancing.placement import Placement, save_placement
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES, Buffer
from fairseq_moe_ext.buffering.simulation import MIN, hottest_experts, layers_of, simulate, simulate_all
from fairseq_moe_ext.trace import PhaseTrace, TraceRecorder, save_trace

ROOT = Path(__file__).resolve().parents[2]


def recorded(calls) -> dict[str, PhaseTrace]:
    recorder = TraceRecorder()
    for phase, batch, loads in calls:
        recorder.begin_step(phase, batch)
        for name, load in loads.items():
            recorder.add(name, load)
    return recorder.trace()


TRACE = recorded([
    ("encoder", 0, {"e": [5, 0, 1]}),
    ("decode", 0, {"d": [1, 0, 0]}),
    ("decode", 0, {"d": [0, 2, 0]}),
    ("encoder", 1, {"e": [1, 1, 1]}),
    ("prefill", 1, {"d": [0, 0, 9]}),
    ("decode", 1, {"d": [1, 1, 1]}),
    ("prefill", 0, {"d": [0, 0, 7]}),
])


def test_calls_are_put_in_the_order_they_were_made():
    layers = {layer.name: layer for layer in layers_of(TRACE)}
    assert layers["e"].loads.tolist() == [[5, 0, 1], [1, 1, 1]]
    assert layers["d"].loads.tolist() == [[0, 0, 7], [1, 0, 0], [0, 2, 0], [0, 0, 9], [1, 1, 1]]
    assert layers["d"].batches() == [[2], [0], [1], [2], [0, 1, 2]]
    assert hottest_experts(layers["d"]) == [2, 1, 0]
    assert hottest_experts(layers["e"]) == [0, 2, 1]


def test_simulate_by_hand():
    """Layer d, one place, expert 0 resident: all its turns miss but the last batch's expert 2."""
    layer = next(layer for layer in layers_of(TRACE) if layer.name == "d")
    first = simulate(layer, 1, "resident-first", "lru")
    assert (first.accesses, first.misses) == (7, 6)
    assert simulate(layer, 1, "ascending", "lru").misses == 7
    assert simulate(layer, 1, "resident-first", "lru", ranking=[2, 1, 0]).misses == 5
    assert first.miss_rate == pytest.approx(6 / 7)


def test_all_sizes_orders_and_policies():
    generator = np.random.default_rng(0)
    trace = recorded([("decode", step // 4, {"d": generator.poisson(0.7, 6).tolist()}) for step in range(40)])
    (layer,) = layers_of(trace)
    outcomes = simulate_all(layer)
    assert len(outcomes) == 6 * len(ORDERS) * (len(POLICIES) + 1)
    by_key = {(each.size, each.order, each.policy): each for each in outcomes}
    for (size, order, policy), each in by_key.items():
        if policy != MIN:
            buffer = Buffer(size, policy, order, range(size))
            assert each.misses == sum(not turn.hit for batch in layer.batches() for turn in buffer.run(batch))
        assert each.misses >= by_key[size, order, MIN].misses >= by_key[size, "resident-first", MIN].misses
    assert by_key[6, "ascending", "fifo"].misses == 0


def run_script(*arguments):
    return processes.run([sys.executable, ROOT / "scripts" / "simulate_buffer.py", *arguments])


def test_the_scripts_table_and_plot(tmp_path):
    save_trace(tmp_path / "trace.npz", TRACE)
    done = run_script(tmp_path / "trace.npz", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "buffer.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    layers = {layer.name: layer for layer in layers_of(TRACE)}
    assert len(rows) == 4 * 3 * len(ORDERS) * (len(POLICIES) + 1)  # two layers, the mean, the worst; three sizes
    rates: dict[tuple, list[float]] = {}
    for row in rows:
        key = int(row["size"]), row["order"], row["policy"]
        if row["layer"] in layers:
            found = simulate(layers[row["layer"]], *key)
            assert (int(row["accesses"]), int(row["misses"])) == (found.accesses, found.misses)
            least = simulate(layers[row["layer"]], *key[:2], MIN).misses
            assert row["times_min"] == (f"{found.misses / least:.4f}" if least else "")
            rates.setdefault(key, []).append(found.miss_rate)
        else:
            expected = np.mean(rates[key]) if row["layer"] == "mean" else max(rates[key])
            assert float(row["miss_rate"]) == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "out" / "buffer.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["buffer.csv", "buffer.png"]


def test_ranks_that_hold_nothing_or_little_of_a_layer(tmp_path):
    """A quarter of the first rank's experts is more than the second one has."""
    save_trace(tmp_path / "trace.npz", recorded([("decode", batch, {"d": [1] * 9, "e": [2] * 9}) for batch in (0, 1)]))
    places = {"d": [(0,)] * 8 + [(1,)], "e": [(0,)] * 9}
    save_placement(tmp_path / "placement.json", Placement(2, places))
    placed = ("--world-size", "2", "--expert-placement", tmp_path / "placement.json")
    done = run_script(tmp_path / "trace.npz", "--output", tmp_path, *placed)
    assert done.returncode == 0, done.stderr
    assert "d, rank 1 " in done.stdout and "e, rank 0 " in done.stdout and "e, rank 1 " not in done.stdout


def test_the_script_takes_a_profile_and_refuses_other_files(tmp_path):
    save_trace(tmp_path / "trace.npz", TRACE)
    done = run_script(tmp_path / "trace.npz", "--output", tmp_path, "--profile", tmp_path / "trace.npz")
    assert done.returncode == 0, done.stderr
    (tmp_path / "text.npz").write_text("no trace")
    done = run_script(tmp_path / "text.npz", "--output", tmp_path)
    assert done.returncode == 2 and "not a routing trace" in done.stderr
