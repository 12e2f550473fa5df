"""Which room knows which: read off the imports, and seen in a fresh process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "fairseq_moe_ext"
ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"gating", "buffering", "balancing", "trace", "tasks", "models", "criterions", "serving", "figures"}
FAIRSEQ_ROOMS = {"tasks", "models", "criterions", "serving", "figures"}
PURE_ROOMS = ROOMS - FAIRSEQ_ROOMS
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Dotted names of every module that a file imports, wherever in it; relative imports made absolute."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def rooms_in(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")} & ROOMS


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) in PURE_ROOMS], ids=name_of)
def test_pure_rooms_know_nothing_of_fairseq(file):
    names = imports(file)
    assert not [name for name in names if name.split(".")[0] in ("fairseq", "fairseq_cli", "omegaconf", "hydra")]
    assert not rooms_in(names) & FAIRSEQ_ROOMS


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) == "gating"], ids=name_of)
def test_gating_knows_of_no_other_room(file):
    assert rooms_in(imports(file)) <= {"gating", "trace"}


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) == "buffering"], ids=name_of)
def test_buffering_knows_the_experts_and_traces_alone(file):
    names = {name for name in imports(file) if name.startswith(f"{PACKAGE}.")}
    known = tuple(f"{PACKAGE}.{name}" for name in ("buffering", "gating.experts", "trace", "atomic_file"))
    assert not [name for name in names if not f"{name}.".startswith((*(f"{each}." for each in known),))]


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) == "balancing"], ids=name_of)
def test_balancing_knows_of_the_trace_only_and_nothing_of_pytorch(file):
    names = imports(file)
    assert rooms_in(names) <= {"balancing", "trace"}
    assert "torch" not in {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) != "figures"], ids=name_of)
def test_nobody_needs_the_figures(file):
    assert "figures" not in rooms_in(imports(file))


def test_the_packages_own_file_imports_nothing():
    assert imports(ROOT / PACKAGE / "__init__.py") <= {"__future__"}


def test_the_reader_of_imports_sees_them():
    """On a file that is known to import fairseq, and on rooms that are there."""
    assert {room_of(file) for file in FILES} >= {"gating", "trace", "models", "tasks", "serving"}
    names = imports(ROOT / PACKAGE / "models" / "transformer_layer.py")
    assert "fairseq" in names and rooms_in(names) == {"gating", "models"}


@pytest.mark.parametrize("module, unknown", [
    (PACKAGE, ("torch", "numpy", "fairseq")),
    (f"{PACKAGE}.gating",
     ("fairseq", "triton", "omegaconf", f"{PACKAGE}.tasks", f"{PACKAGE}.models", f"{PACKAGE}.serving")),
    (f"{PACKAGE}.buffering.cache", ("fairseq", "omegaconf", f"{PACKAGE}.tasks", f"{PACKAGE}.serving")),
    (f"{PACKAGE}.buffering.simulation", ("torch", "fairseq", "matplotlib")),
    (f"{PACKAGE}.balancing.plot", ("torch", "fairseq", "matplotlib", f"{PACKAGE}.gating", f"{PACKAGE}.serving")),
    (f"{PACKAGE}.trace", ("torch", "fairseq", f"{PACKAGE}.gating", f"{PACKAGE}.serving")),
])
def test_in_a_fresh_process(module, unknown):
    code = f"import sys, {module}; print(*[name for name in {unknown!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
