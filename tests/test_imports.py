"""Which room knows which: read off the imports, and seen in a fresh process."""

import ast
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import processes

PACKAGE = "fairseq_moe_ext"
ROOT = Path(__file__).resolve().parents[1]
# from the top down: a room may know those below it (docs/internals.md)
ORDER = (
    *("command_line", "tasks", "serving", "decoding", "reporting", "ranks", "models", "criterions", "nllb"),
    *("checkpoints", "buffering", "balancing", "experts", "gating", "kernels"),
)
# single files that all may know
HELPERS = {"trace", "recording", "npz_reading", "atomic_file", "bounded_json", "byte_sizes", "option_names"}
HELPERS |= {"safetensors_header", "torch_versions"}
PURE_ROOMS = {"experts", "gating", "kernels", "buffering", "balancing"}
FAIRSEQ_ROOMS = {*ORDER} - PURE_ROOMS
ROOMS = {*ORDER} | HELPERS
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


@functools.cache
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


def files_where(wrong: Callable[[Path], bool], rooms: set[str]) -> list[str]:
    """Files of these rooms whose imports break a rule."""
    assert {room_of(file) for file in FILES} >= rooms
    return [str(file.relative_to(ROOT)) for file in FILES if room_of(file) in rooms and wrong(file)]


def upward_arrows() -> set[tuple[str, str]]:
    """(file, room above it) of all imports that break the order."""
    return {
        (str(file.relative_to(ROOT / PACKAGE)), room)
        for file in FILES
        if room_of(file) in ORDER
        for room in rooms_in(imports(file)) - HELPERS
        if ORDER.index(room) < ORDER.index(room_of(file))
    }


def test_arrows_between_rooms_run_down_only():
    assert upward_arrows() == set()


def test_single_files_know_of_no_room():
    assert not files_where(lambda file: rooms_in(imports(file)) & {*ORDER}, HELPERS)


def test_every_room_has_its_place_in_the_order():
    folders = {file.parent.name for file in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert folders == {*ORDER}


def test_pure_rooms_know_nothing_of_fairseq():
    fairseqs = {"fairseq", "fairseq_cli", "omegaconf", "hydra"}
    assert not files_where(lambda file: fairseqs & {name.split(".")[0] for name in imports(file)}, PURE_ROOMS | HELPERS)


def test_kernels_know_tensors_only():
    assert not files_where(lambda file: rooms_in(imports(file)) - {"kernels", "torch_versions"}, {"kernels"})


def test_buffering_knows_the_experts_traces_and_records_alone():
    known = {"buffering", "experts", "kernels", "trace", "recording"}
    known |= {"atomic_file", "bounded_json", "byte_sizes", "npz_reading", "safetensors_header"}
    assert not files_where(lambda file: rooms_in(imports(file)) - known, {"buffering"})


def test_balancing_knows_of_the_trace_only_and_nothing_of_pytorch():
    known = {"balancing", "trace", "atomic_file", "bounded_json"}
    assert not files_where(lambda file: rooms_in(imports(file)) - known, {"balancing"})
    assert not files_where(lambda file: "torch" in {name.split(".")[0] for name in imports(file)}, {"balancing"})


def test_nobody_needs_the_scripts():
    scripts = {"reproduction", "benchmarks", "scripts"}
    assert not files_where(lambda file: scripts & {name.split(".")[0] for name in imports(file)}, ROOMS)


def test_the_packages_own_file_imports_nothing():
    # `load` comes by importlib, when it is asked for
    assert imports(ROOT / PACKAGE / "__init__.py") <= {"__future__", "importlib"}


def test_the_reader_of_imports_sees_them():
    """On a file that is known to import fairseq, and on rooms that are there."""
    assert {room_of(file) for file in FILES} >= {"gating", "trace", "models", "tasks", "serving"}
    names = imports(ROOT / PACKAGE / "models" / "transformer_layer.py")
    assert "fairseq" in names and rooms_in(names) == {"checkpoints", "experts", "gating"}
    assert files_where(lambda file: "fairseq" in imports(file), {"models"})


# what must not be there once a module is: the purest first, all in one process
UNKNOWN = {
    PACKAGE: ("torch", "numpy", "fairseq"),
    f"{PACKAGE}.trace": ("torch", "fairseq", f"{PACKAGE}.gating", f"{PACKAGE}.serving"),
    f"{PACKAGE}.balancing.plot": ("torch", "fairseq", "matplotlib", f"{PACKAGE}.gating", f"{PACKAGE}.serving"),
    f"{PACKAGE}.buffering.simulation": ("torch", "fairseq", "matplotlib"),
    f"{PACKAGE}.gating": (
        *("fairseq", "triton", "omegaconf", f"{PACKAGE}.tasks", f"{PACKAGE}.models", f"{PACKAGE}.serving"),
    ),
    f"{PACKAGE}.buffering.cache": ("fairseq", "omegaconf", f"{PACKAGE}.tasks", f"{PACKAGE}.serving"),
}


def test_in_a_fresh_process():
    code = "import importlib, sys\n"
    code += f"for module, unknown in {UNKNOWN!r}.items():\n"
    code += "    importlib.import_module(module)\n"
    code += "    print(*[(module, name) for name in unknown if name in sys.modules])\n"
    done = processes.run([sys.executable, "-c", code], cwd=ROOT, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
