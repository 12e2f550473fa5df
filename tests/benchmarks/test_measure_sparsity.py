"""scripts/benchmarks/measure_sparsity.py: what it counts, and the command on a small model."""

from __future__ import annotations

import importlib.util
import re
import sys

import commands
import processes
import pytest
import torch

SCRIPT = commands.REPOSITORY / "scripts" / "benchmarks" / "measure_sparsity.py"


def test_zeros_are_counted_alone_and_in_neighbouring_rows():
    spec = importlib.util.spec_from_file_location("measure_sparsity", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    counted = script.Counted(torch.relu)
    hidden = torch.tensor([[-1.0, 2.0, -3.0], [0.0, -1.0, 4.0], [-1.0, -1.0, 0.5]])
    assert torch.equal(counted(hidden), hidden.relu())
    counted(hidden[:1])
    # 2 + 2 + 2 zeros, and 2 of the row alone; neighbours: the first two share one column, the last two share two
    assert (counted.zeros, counted.values, counted.zero_pairs, counted.pairs) == (8, 12, 3, 6)


@pytest.mark.slow
def test_every_moe_layer_has_its_row(golden_folder):
    folder = golden_folder("tiny_mt")
    command = [sys.executable, SCRIPT, folder / "checkpoint_last.pt", folder / "data-bin", "--batches", "2"]
    done = processes.run(command, timeout=120, env=commands.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| (\S+moe_layer)\s+\|\s+(\d+) \| (\d+)%\s+\| (\d+)%", done.stdout, re.M)
    assert rows and {name.split(".")[0] for name, *_ in rows} == {"encoder", "decoder"}
    for _, values, zero, zero_in_two in rows:
        assert int(values) > 0 and 0 < int(zero_in_two) <= int(zero) < 100
