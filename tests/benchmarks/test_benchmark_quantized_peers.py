"""scripts/benchmarks/benchmark_quantized_peers.py, the part that needs no environment of its own."""

import json
import sys

import commands
import processes
import pytest
from kernel_calls import runs_here

SCRIPT = commands.REPOSITORY / "scripts" / "benchmarks" / "benchmark_quantized_peers.py"
OURS = ("ours, float32", "ours, int8", "ours, int4", "ours, int8 dense")


def run(*arguments):
    return processes.run([sys.executable, SCRIPT, *arguments], timeout=200, env=commands.environment())


@pytest.mark.skipif(not runs_here("plain"), reason="no kernel here")
def test_ours_and_pytorchs_experts_are_timed_in_turn(tmp_path):
    done = run("--quick", "--rows", "1", "3", "--seconds", "0.2", "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "quantized_peers.json").read_text())
    assert content["facts"]["our_experts.py"]["instructions"] in done.stdout
    for count in (1, 3):
        rows = {row["implementation"]: row for row in content["figures"] if row["rows"] == count}
        timed_or_not = {*rows, *content["left_out"]}
        assert set(OURS) <= set(rows) and {"PyTorch int8", "PyTorch int4"} <= timed_or_not
        for row in rows.values():
            assert row["calls"] >= 2 and row["milliseconds"] > 0
            assert row["quarters"][0] <= row["times_ours"] <= row["quarters"][1]
        assert rows["ours, float32"]["times_ours"] == 1
    assert (tmp_path / "quantized_peers.md").read_text() == done.stdout[:-1]


@pytest.mark.parametrize(
    "arguments, words",
    (
        ([], "--environments FOLDER is needed, or --quick"),
        (["--quick", "--seconds", "0"], "--seconds must be above 0, got 0.0"),
        (["--environments", "x", "--hidden-dim", "100"], "--hidden-dim must be a multiple of 256, got 100"),
    ),
)
def test_what_cannot_be_measured_is_refused(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr
