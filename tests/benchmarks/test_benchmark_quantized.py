"""The benchmark of quantised experts, on experts that are too small to say anything."""

import json
import sys

import commands
import processes
import pytest
from kernel_calls import runs_here

SCRIPT = commands.REPOSITORY / "scripts" / "benchmarks" / "benchmark_quantized.py"


@pytest.mark.skipif(not runs_here("plain"), reason="no kernel here")
def test_the_benchmark_of_quantised_experts_times_all_of_them(tmp_path):
    small = ["--model-dim", "64", "--hidden-dim", "128", "--experts", "2", "--rows", "1", "3", "--rounds", "2"]
    command = [sys.executable, SCRIPT, *small, "--output", tmp_path / "times.json"]
    result = processes.run(command, timeout=120, env=commands.environment())
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads((tmp_path / "times.json").read_text())
    assert "1 thread(s), 2 experts of 64 x 128" in result.stdout
    assert [its["rows"] for its in figures["figures"]] == [1, 3]
    for its in figures["figures"]:
        assert {"float32", "int8", "int4"} <= set(its["milliseconds"]) and min(its["milliseconds"].values()) > 0
        assert {"int8", "int4"} <= set(its["ratios"])
