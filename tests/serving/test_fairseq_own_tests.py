"""fairseq's own tests, run against the plugin.

They are not part of this repository: FAIRSEQ_SOURCE names a checkout of fairseq's branch `main`, whose folder tests/
is copied. Of its models those that the plugin has become MoE models (tests/fairseqs_own_conftest.py). Left out are
tests of other families, of GPUs and of networks, and of TorchScript (test_export.py and those named Jit), which takes
no layer whose tokens choose its experts.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
IMPORT = "from fairseq.sequence_generator import EnsembleModel, SequenceGenerator"
OURS = (
    "from fairseq.sequence_generator import EnsembleModel\n"
    "from fairseq_moe_ext.decoding.generator import MoESequenceGenerator as SequenceGenerator"
)
END_TO_END = (
    "TestTranslation and (raw or update_freq or max_positions or test_generation or eval_bleu or test_transformer or "
    "alignment or layerdrop or multi_simple) or TestLanguageModeling and (transformer_lm or normformer) or "
    "TestActivationCheckpointing"
)


@pytest.fixture
def tests(tmp_path) -> Path:
    """A copy of fairseq's tests."""
    source = os.environ.get("FAIRSEQ_SOURCE")
    if not source:
        pytest.skip("FAIRSEQ_SOURCE names no checkout of fairseq")
    shutil.copytree(Path(source) / "tests", tmp_path / "tests")
    (tmp_path / "tests" / "__init__.py").touch()
    return tmp_path / "tests"


def passed(tests: Path, file: str, selected: str = "", timeout: float = 600) -> int:
    """How many of a file's tests pass; none may fail."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"tests/{file}"]
        + (["-k", selected] if selected else []),
        cwd=tests.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{tests.parent}{os.pathsep}{REPOSITORY}",
            "PLUGIN": str(REPOSITORY / "fairseq_moe_ext"),
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # fairseq's training goes on from what it saved itself
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "failed" not in done.stdout.splitlines()[-1]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


def test_the_generator_passes_fairseqs_own_tests(tests):
    file = tests / "test_sequence_generator.py"
    text = file.read_text(encoding="utf-8")
    assert text.count(IMPORT) == 1
    file.write_text(text.replace(IMPORT, OURS), encoding="utf-8")
    assert passed(tests, file.name) >= 17


@pytest.mark.parametrize(
    ("file", "selected", "least"),
    [
        ("test_transformer.py", "", 2),
        ("test_inference_dropout.py", "", 4),
        ("test_lm_context_window.py", "", 1),
        ("test_sequence_scorer.py", "", 1),
        ("test_sequence_generator.py", "not Jit", 14),
        ("test_valid_subset_checks.py", "", 5),
        # not from one epoch to the next: fairseq makes its batches once, of the epoch in which a training begins, so
        # that one that goes on has others. A dense model's mean loss hides it, a gate's choices do not always
        ("test_reproducibility.py", "mid_epoch", 1),
    ],
)
def test_models_with_experts_pass_fairseqs_own_tests(tests, file, selected, least):
    with_experts(tests)
    assert passed(tests, file, selected) >= least


def test_models_with_experts_are_trained_and_served_end_to_end(tests):
    """fairseq's commands one after the other, with the options that its own tests give them."""
    with_experts(tests)
    assert passed(tests, "test_binaries.py", END_TO_END, timeout=1800) >= 18


def with_experts(tests: Path) -> None:
    shutil.copy(REPOSITORY / "tests" / "fairseqs_own_conftest.py", tests / "conftest.py")
