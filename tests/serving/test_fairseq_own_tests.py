"""fairseq's own tests of its generator, run against the plugin's class.

They are not part of this repository: FAIRSEQ_SOURCE names a checkout of fairseq's branch `main`, of which
tests/test_sequence_generator.py and tests/utils.py are read.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT = "from fairseq.sequence_generator import EnsembleModel, SequenceGenerator"
OURS = (
    "from fairseq.sequence_generator import EnsembleModel\n"
    "from fairseq_moe_ext.decoding.generator import MoESequenceGenerator as SequenceGenerator"
)


@pytest.mark.slow
def test_the_generator_passes_fairseqs_own_tests(tmp_path):
    source = os.environ.get("FAIRSEQ_SOURCE")
    if not source:
        pytest.skip("FAIRSEQ_SOURCE names no checkout of fairseq")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "__init__.py").touch()
    (tests / "utils.py").write_text((Path(source) / "tests" / "utils.py").read_text(encoding="utf-8"))
    text = (Path(source) / "tests" / "test_sequence_generator.py").read_text(encoding="utf-8")
    assert text.count(IMPORT) == 1
    (tests / "test_sequence_generator.py").write_text(text.replace(IMPORT, OURS), encoding="utf-8")
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_sequence_generator.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 17
    assert "failed" not in done.stdout.splitlines()[-1]
