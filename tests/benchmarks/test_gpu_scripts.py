"""The scripts that measure on a GPU, tiny and on the CPU: that they run, and what they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--layers", "4", "--model-dim", "16", "--hidden-dim", "32", "--experts", "8", "--vocabulary", "99",
    "--steps", "3", "--source-length", "6", "--batch", "2", "--max-batch", "4",
)


def run(*command, **environment):
    return subprocess.run(
        [str(each) for each in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )


@pytest.mark.grouped_mm
def test_the_random_model_serves_every_way(tmp_path):
    output = tmp_path / "model.json"
    script = ROOT / "scripts" / "benchmarks" / "benchmark_random_model.py"
    command = [sys.executable, script, *TINY, "--buffer-size", "3", "--kernel", "grouped-mm", "--output", output]
    result = processes.run(command, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())
    for gating in ("dynamic", "static"):
        for place, size in (("memory", 8), ("buffer", 3)):
            *batches, end = [row for row in rows if (row["gating"], row["experts_in"]) == (gating, place)]
            assert [row["batch"] for row in batches] == [2, 4] and end["largest_batch"] == 4
            for row in batches:
                assert row["experts_resident"] == size
                assert row["encoder_tokens"] == 6 * row["batch"] and row["decoder_tokens"] == 3 * 4 * row["batch"]
                assert row["encoder_tokens_per_second"] > 0 and row["decoder_tokens_per_second"] > 0
                assert 1 <= row["decoder_active_experts"] <= row["encoder_active_experts"] <= 8
    assert "kernel: grouped-mm" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_measurements_without_a_gpu():
    result = run("bash", "scripts/benchmarks/measure_gpu.sh")
    assert result.returncode == 1 and "--device must be cpu where PyTorch finds no GPU, got cuda" in result.stderr
    assert result.stderr.endswith("nothing was measured\n") and not (ROOT / "docs" / "results" / "gpu-cpu").exists()


@pytest.mark.grouped_mm
def test_the_measurements_go_on_after_a_failure(tmp_path):
    """A python that fails for one script stands for a step that does not run on some machine."""
    python, folder = tmp_path / "python", tmp_path / "results"
    python.write_text(f'#!/bin/sh\ncase "$*" in *tune_tiles*) echo broken; exit 3;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    steps = "tiles-nllb-54b layer-lm-52b-bfloat16"
    only = ("--device", "cpu", "--small", "--output", folder, "--only", steps)
    result = run("bash", "scripts/benchmarks/measure_gpu.sh", *only, PYTHON=str(python))
    assert result.returncode == 3, result.stderr
    lines = (folder / "README.md").read_text().splitlines()
    table = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[2] for line in lines if line.startswith("| ")}
    assert table == {"step": "outcome", "tiles-nllb-54b": "failed (3)", "layer-lm-52b-bfloat16": "done"}
    assert any(line.startswith(f"PyTorch {torch.__version__}") for line in lines)
    assert (folder / "tiles-nllb-54b.txt").read_text() == "broken\n"
    rows = json.loads((folder / "layer-lm-52b-bfloat16.json").read_text())
    found = {row["implementation"] for row in rows} - {"products"}  # by what the CPU can do
    assert found == {"dynamic", "grouped-mm", "static", "dense", "weights"}
    assert all(row["median_ms"] > 0 for row in rows)

    result = run("bash", "scripts/benchmarks/measure_gpu.sh", *only, "--limit", "1", PYTHON=str(python))
    assert result.returncode == 124
    assert (folder / "README.md").read_text().count("left out, no time") == 2
