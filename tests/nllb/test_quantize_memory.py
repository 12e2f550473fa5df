"""How much memory quantising takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hf_makers
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quantize_checkpoint.py"
CODE = """
import resource, runpy, sys
sys.path.insert(0, sys.argv[1])
main = runpy.run_path(sys.argv[2])["main"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[3:])
print(1024 * before, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
def test_peak_memory_of_a_1_gb_model_is_its_imports_an_expert_and_little_more(tmp_path):
    sizes = {"d_model": 512, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "num_experts": 16}
    config = {**hf_makers.TINY, **sizes, "vocab_size": hf_makers.PIECES + 1 + len(hf_makers.LANGUAGES) + 3}
    hf_makers.write_hollow_model(tmp_path / "hf", config)
    expert = 4 * 2 * 512 * 4096
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 60 * expert
    arguments = (tmp_path / "hf", "--output", tmp_path / "X.safetensors", "--experts", "int8", "--dense", "int8")
    command = [sys.executable, "-c", CODE, str(SCRIPT.parents[1]), str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    print(f"imports {before / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, an expert {expert / 1e6:.0f} MB")
    assert peak - before < 4 * expert
