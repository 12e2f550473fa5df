"""scripts/benchmarks/full_shape.py on shapes small enough for a test: written in the format, served by the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import commands
import pytest

from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.kernels.block import Block

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "full_shape.py"
SMALL = ("--layers", "4", "--model-dim", "64", "--experts", "8", "--vocabulary", "500", "--batches", "1")


def run(folder: Path, *more: str) -> list[dict]:
    output = folder / "found.json"
    command = [sys.executable, SCRIPT, "--folder", folder / "made", *SMALL, "--output", output, *more]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_translation_model_is_written_and_served(tmp_path):
    (row,) = run(tmp_path, "--buffer", "2", "--steps", "5")
    about = QuantizedFile(tmp_path / "made" / "model.safetensors").about
    assert (about.experts, about.dense) == ("int4", "int8") and len(about.dims) > 2
    assert row["seconds_per_step"] > 0 and row["seconds_per_encoder_pass"] > 0
    # of the encoder's one MoE layer alone, an expert at a time
    assert round(row["bytes_read_per_batch"] * 3) % Block(4, 64, 256).nbytes == 0 < row["bytes_read_per_batch"]


@pytest.mark.slow
def test_a_language_model_is_written_and_evaluated(tmp_path):
    (row,) = run(tmp_path, "--shape", "lm-52b", "--buffer", "0")
    assert row["bytes_read_per_batch"] == 0 and "seconds_per_encoder_pass" not in row
    assert 1 <= row["decoder_active_experts"] <= 2 * 8
