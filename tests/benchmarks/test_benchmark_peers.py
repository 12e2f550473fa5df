"""scripts/benchmarks/benchmark_peers.py, the part that needs no environment of its own."""

from __future__ import annotations

import json
import sys

import commands
import processes
import pytest

pytestmark = pytest.mark.slow


def test_ours_and_fairscales_layers_agree_and_are_timed(tmp_path):
    script = commands.REPOSITORY / "scripts" / "benchmarks" / "benchmark_peers.py"
    command = [sys.executable, script, "--quick", "--seconds", "1", "--output", tmp_path]
    done = processes.run(command, timeout=300, env=commands.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "peers.json").read_text())["layers"][0]["rows"]
    assert [row["implementation"] for row in rows] == ["ours, dynamic", "fairscale MOELayer"]
    for row in rows:  # a peer whose outputs are not ours is left out
        assert "left_out" not in row
        assert row["calls"] >= 3 and row["times_floor"] > 0
    assert rows[0]["times_ours"] == 1
    assert (tmp_path / "peers.md").read_text() == done.stdout[:-1]
