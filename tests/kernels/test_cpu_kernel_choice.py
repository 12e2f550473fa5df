"""Which instructions of the C kernel run, up to how many rows, and what is refused."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from kernel_calls import REPOSITORY, needs_compiler, runs_here

from fairseq_moe_ext.kernels import cpu_kernel, crossing
from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS, CHOICES, INSTRUCTIONS, VARIABLE
from fairseq_moe_ext.kernels.crossing import TABLE, most_rows

CPU = torch.device("cpu")


@pytest.mark.slow
@needs_compiler
def test_the_kernel_compiles_without_a_warning(tmp_path):
    parts = ["build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    flags = {**os.environ, "CFLAGS": "-Wall -Wextra -Werror"}
    subprocess.run([sys.executable, "setup.py", "-q", *parts], cwd=REPOSITORY, env=flags, check=True)
    (file,) = tmp_path.glob("fairseq_moe_ext/kernels/_cpu_kernel*")
    assert 0 <= ctypes.CDLL(file).best_instructions() < len(INSTRUCTIONS)


def test_few_rows_go_to_the_kernel_where_there_is_one(monkeypatch):
    there_is_one = runs_here("plain")
    monkeypatch.setattr(crossing, "has_units", lambda dtype: False)
    for choice, there in (("auto", there_is_one), ("plain", there_is_one), ("off", False)):
        if there or choice != "plain":
            monkeypatch.setenv(VARIABLE, choice)
            instructions = cpu_kernel.load_kernel().instructions if there else None
            assert most_rows(torch.float32, CPU) == (TABLE[instructions][torch.float32] if there else 0) < ANY_ROWS
            of_16_bits = TABLE[instructions][torch.float16] if there else 0
            assert most_rows(torch.float16, CPU) == most_rows(torch.bfloat16, CPU) == of_16_bits
            assert most_rows(torch.float64, CPU) == 0
    monkeypatch.setenv(VARIABLE, "auto")
    monkeypatch.setattr(crossing, "has_units", lambda dtype: dtype != torch.float32)
    if there_is_one:
        assert most_rows(torch.bfloat16, CPU) == most_rows(torch.float16, CPU) == crossing.UNITS_ROWS
        assert most_rows(torch.float32, CPU) > crossing.UNITS_ROWS


@pytest.mark.parametrize("choice", ("avx", "AVX2", "0", "on"))
def test_a_choice_that_there_is_not_is_refused(monkeypatch, choice):
    monkeypatch.setenv(VARIABLE, choice)
    with pytest.raises(ValueError, match=f"^{VARIABLE} must be one of {', '.join(CHOICES)}, got '{choice}'$"):
        cpu_kernel.load_kernel()


def test_a_choice_that_this_machine_lacks_is_refused(monkeypatch):
    cpu_kernel._kernel.cache_clear()
    for choice in INSTRUCTIONS:
        monkeypatch.setenv(VARIABLE, choice)
        monkeypatch.setattr(cpu_kernel, "_library", lambda: None)
        with pytest.raises(ValueError, match=f"^{VARIABLE} {choice} needs the C kernel, which"):
            cpu_kernel.load_kernel()
    for choice, needs in (("avx2", "AVX2, FMA and F16C"), ("avx512", "AVX-512 ")):
        monkeypatch.setenv(VARIABLE, choice)
        monkeypatch.setattr(cpu_kernel, "_library", lambda: type("", (), {"best_instructions": lambda self: 0})())
        with pytest.raises(ValueError, match=f"^{VARIABLE} {choice} needs a CPU with {needs}"):
            cpu_kernel.load_kernel()
    cpu_kernel._kernel.cache_clear()


@pytest.mark.parametrize(
    "value, rule", [("all", "must be one of auto, any, got 'all'"), ("any", "any needs the C kernel")]
)
def test_rows_that_cannot_go_to_the_kernel_are_refused(monkeypatch, value, rule):
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.setenv(crossing.VARIABLE, value)
    with pytest.raises(ValueError, match=f"^{crossing.VARIABLE} {rule}"):
        crossing.check_rows()
    if value == "all":
        with pytest.raises(ValueError, match=rule):
            most_rows(torch.float32, CPU)


def test_a_kernel_that_is_not_this_one_is_none(monkeypatch, tmp_path):
    """A checkout may have moved on since it was installed, or lie on a disk that several machines share."""
    (tmp_path / "text.so").write_text("no library")
    if (library := cpu_kernel._library()) is not None:
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernel, "VERSION", library.cpu_kernel_version() + 1)
            assert cpu_kernel._library() is None
    for file in (cpu_kernel.find_spec("_ctypes").origin, str(tmp_path / "text.so"), str(tmp_path / "none.so"), None):
        monkeypatch.setattr(cpu_kernel, "find_spec", lambda name, file=file: type("", (), {"origin": file})())
        assert cpu_kernel._library() is None
        monkeypatch.undo()
