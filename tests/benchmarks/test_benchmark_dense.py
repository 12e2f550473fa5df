"""The benchmark of dense int8 layers, on layers that are too small to say anything."""

import json
import sys

import commands
import processes
import pytest
from kernel_calls import runs_here

SCRIPT = commands.REPOSITORY / "scripts" / "benchmarks" / "benchmark_dense.py"


@pytest.mark.skipif(not runs_here("plain"), reason="no kernel here")
def test_the_benchmark_of_dense_layers_times_both_at_every_number_of_rows(tmp_path):
    small = ["--dims", "64x128", "70x64", "--rows", "1", "3", "--seconds", "0.01", "--mebibytes", "1"]
    command = [sys.executable, SCRIPT, *small, "--output", tmp_path / "times.json"]
    result = processes.run(command, timeout=120, env=commands.environment())
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads((tmp_path / "times.json").read_text())["figures"]
    sizes = [(its["outputs"], its["inputs"], its["rows"]) for its in figures]
    assert sizes == [(64, 128, 1), (64, 128, 3), (70, 64, 1), (70, 64, 3)]
    for its in figures:
        assert its["float32_ms"] > 0 and its["int8_ms"] > 0 and its["rounds"] >= 5
        assert its["quarters"][0] <= its["ratio"] <= its["quarters"][1]
        assert f"| {its['outputs']} x {its['inputs']}" in result.stdout


def test_dims_that_are_none_are_refused(tmp_path):
    result = processes.run([sys.executable, SCRIPT, "--dims", "64x0"], timeout=60, env=commands.environment())
    assert result.returncode == 2
    assert "--dims: must be OUTPUTSxINPUTS, each at least 1, got '64x0'" in result.stderr
