"""scripts/benchmarks/measure_quantizing.py on experts small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import commands
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "measure_quantizing.py"


@pytest.mark.slow
def test_the_command_and_the_disk_are_timed_and_nothing_is_left(tmp_path):
    sizes = ("--model-dim", "64", "--hidden-dim", "128", "--files", "2", "--experts-a-file", "2", "--vocabulary", "90")
    command = [sys.executable, SCRIPT, "--folder", tmp_path / "made", *sizes, "--rounds", "1", "--sources", "float16"]
    command += ["--experts", "int4", "--output", tmp_path / "found.json"]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (row["source"], row["experts"]) == ("float16", "int4")
    assert row["share"] == pytest.approx((row["read"] + row["write"]) / row["command"])
    assert 4 * 2 * 64 * 128 * 2 < row["source_bytes"] and 0 < row["target_bytes"] < row["source_bytes"]
    assert not list((tmp_path / "made").iterdir())
