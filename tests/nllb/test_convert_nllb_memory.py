"""How much memory converting takes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import hf_makers
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_nllb_moe.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory_of_a_2_gb_model_stays_under_twice_a_shard_and_1_gb(tmp_path, kind):
    sizes = {"d_model": 256, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "num_experts": 80}
    hf_makers.write_model(tmp_path / "hf", shards=8, kind=kind, **sizes)
    shards = [file.stat().st_size for file in (tmp_path / "hf").glob("*-of-*")]
    assert sum(shards) > 1.9e9
    command = [sys.executable, str(SCRIPT), str(tmp_path / "hf"), "--output", str(tmp_path / "x.pt")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    reader = threading.Thread(target=process.stderr.read)
    reader.start()
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
        peak = max(peak, int(line.split()[1]) * 1024 if line else 0)
        time.sleep(0.05)
    reader.join()
    assert process.returncode == 0
    print(f"{kind}: {sum(shards) / 1e9:.2f} GB, largest shard {max(shards) / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < 2 * max(shards) + 1e9
