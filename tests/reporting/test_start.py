"""Before the first pass: what PyTorch loads late, and the line that says by what experts are computed."""

import re
import sys

import commands
import processes
import pytest
import torch
from served_models import Loader

FIRST_PASS = """
import sys
import torch
from test_observer import run, served

model, observer = served("mt")
known = set(sys.modules)
run(model)
assert observer.report.encoder.steps == observer.report.decoder.steps == 1
print(*sorted(set(sys.modules) - known))
"""


@pytest.fixture
def loader(shared_goldens):
    return Loader(shared_goldens)


def lines(caplog) -> list[str]:
    said = [record.getMessage() for record in caplog.records]
    return [line.removeprefix("experts are computed by ") for line in said if line.startswith("experts are computed")]


def test_the_first_pass_imports_nothing():
    """PyTorch's attention would import half a second's worth of modules in it."""
    folder = commands.REPOSITORY / "tests"
    paths = ":".join(map(str, (commands.REPOSITORY, folder, folder / "reporting")))
    done = processes.run([sys.executable, "-c", FIRST_PASS], env=commands.environment(PYTHONPATH=paths), fresh=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize("choice, ours", [("plain", "the C kernel (plain) up to 48 rows of one, by "), ("off", "")])
def test_the_line_on_a_cpu(loader, caplog, monkeypatch, choice, ours):
    monkeypatch.setenv("FAIRSEQ_MOE_CPU_KERNEL", choice)
    products = f"PyTorch's products ({torch.backends.cpu.get_cpu_capability()})"
    with caplog.at_level("INFO", "fairseq_moe_ext"):
        loader.load("lm_top2", {})
    assert lines(caplog) == [f"{ours}{products}{' beyond' if ours else ''}, float32 on cpu"]


@pytest.mark.parametrize("choice, how", [("plain", r"the C kernel \(plain\)"), ("off", "PyTorch's products")])
@pytest.mark.parametrize("kernel, line", [("auto", "the kernel quantized, {}"), ("loop", "the kernel widened")])
def test_the_line_of_quantised_experts(loader, caplog, monkeypatch, choice, how, kernel, line):
    monkeypatch.setenv("FAIRSEQ_MOE_CPU_KERNEL", choice)
    with caplog.at_level("INFO", "fairseq_moe_ext"):
        loader.load("lm_top2", {}, "--moe-weights", "int4", "--moe-kernel", kernel)
    words = rf"experts in int4 \(0.\d MiB\) are computed by {line.format(how)}, float32 on cpu"
    assert sum(re.fullmatch(words, record.getMessage()) is not None for record in caplog.records) == 1


@pytest.mark.parametrize("flags, line", [
    (("--moe-kernel", "grouped-mm"), "the kernel grouped-mm, float32 on cpu"),
    (("--moe-dtype", "float16"), "the C kernel .*, float16 on cpu|PyTorch's products (.*), float16 on cpu"),
    (("--expert-buffer-size", "2"), ".*PyTorch's products .*, float32 on cpu"),
    (("--moe-gating", "static"), ".*PyTorch's products .*, float32 on cpu"),
])
def test_the_line_speaks_of_what_runs(loader, caplog, flags, line):
    with caplog.at_level("INFO", "fairseq_moe_ext"):
        loader.load("lm_top2", {}, *flags)
    (found,) = lines(caplog)
    assert re.fullmatch(line, found), found
