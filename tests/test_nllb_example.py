"""The scripts of examples/nllb from nothing to scores, on the tiny model that they make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_examples_nllb_quantized_sh_goes_from_the_folder_to_a_score(tmp_path):
    environment = {**os.environ, "WORK": str(tmp_path), "PYTHON_BIN": str(Path(sys.executable).parent)}
    command = ["bash", str(ROOT / "examples" / "nllb" / "quantized.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a quantised checkpoint of" in done.stdout and "experts in int4, dense layers in int8" in done.stdout
    score = done.stdout.split("chrF++ of eng_Latn to deu_Latn:\n")[1]
    assert 0 <= float(score) <= 100
    folder = tmp_path / "nllb-quantized"
    hypotheses = (folder / "hypotheses.deu_Latn").read_text(encoding="utf-8").splitlines()
    assert len(hypotheses) == 4 and not any("\u2581" in line or "__" in line for line in hypotheses)
    assert {file.name for file in folder.iterdir() if file.suffix == ".safetensors"} == {"model.safetensors"}


@pytest.mark.slow
def test_examples_nllb_run_sh_converts_translates_and_reuses_what_is_done(tmp_path):
    environment = {**os.environ, "WORK": str(tmp_path), "PYTHON_BIN": str(Path(sys.executable).parent)}
    command = ["bash", str(ROOT / "examples" / "nllb" / "run.sh")]
    for _ in range(2):  # finished parts are reused
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "chrF++ and spBLEU of eng_Latn to deu_Latn:" in done.stdout
        assert "S-1\t__eng_Latn__ We need two tickets to Berlin." in done.stdout
    hypotheses = (tmp_path / "nllb" / "hypotheses.deu_Latn").read_text(encoding="utf-8").splitlines()
    assert len(hypotheses) == 4 and not any("__" in line for line in hypotheses)
