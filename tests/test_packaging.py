"""sdist and wheel: built, installed and used where there is no checkout. Dependencies are the test environment's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import commands  # noqa: F401  registers the tasks
import pytest
from data_makers import MT_TRAINING, untrained_checkpoint, write_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv*", "build", "dist", "results", "output", "outputs", "multirun", "*.egg-info", "*.so"),
    *("__pycache__", ".hypothesis", ".pytest_cache", ".ruff_cache", ".mypy_cache"),
)
PACKAGE_FOLDER = "import fairseq_moe_ext, os; print(os.path.dirname(fairseq_moe_ext.__file__))"


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Without the variables by which Python would find the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([str(each) for each in command], cwd=cwd, env=env, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def copied(folder: Path) -> Path:
    """The checkout without what was built in it: building leaves files behind."""
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results")  # a page's pictures
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=copied(folder / "checkout"))
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def unpacked(sdist) -> Path:
    """The sdist's content, in a folder with what lies beside a checkout."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    if (ROOT.parent / "shared").is_dir():
        (sdist.parent / "shared").symlink_to(ROOT.parent / "shared")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked) -> Path:
    """Made of the sdist, as pip does where there is no wheel."""
    how = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *how, "-w", unpacked.parent, unpacked, cwd=unpacked.parent)
    (found,) = unpacked.parent.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of a new environment with the wheel; the test environment's packages are behind its own."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file is no site folder: the editable installation's own .pth is not read
    behind = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(behind) + "\n")
    how = ("install", "--no-deps", "--no-index", "--force-reinstall")
    run(sys.executable, "-m", "pip", "--python", python, *how, wheel, cwd=folder)
    return folder / "bin"


def test_the_sdist_has_what_the_tests_need(sdist, unpacked):
    copy = sdist.parent / "checkout"
    folders = ("fairseq_moe_ext", "tests", "scripts", "examples", "docs", ".ci")
    wanted = {file for folder in folders for file in (copy / folder).rglob("*") if file.is_file()}
    wanted |= {copy / name for name in ("setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md")}
    missing = [str(file.relative_to(copy)) for file in wanted if not (unpacked / file.relative_to(copy)).is_file()]
    assert not missing and len(wanted) > 300
    collected = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests")
    run(sys.executable, *collected, cwd=unpacked, PYTHONPATH=str(unpacked))
    passed = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_setup.py", "tests/test_imports.py")
    run(sys.executable, *passed, cwd=unpacked, PYTHONPATH=str(unpacked))


def test_the_wheel_is_the_package_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        scripts = archive.read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
        kernels = [archive.read(name) for name in names if name.endswith(".so")]
    top = {name.split("/")[0] for name in names}
    assert top == {"fairseq_moe_ext", wheel.name.split("-")[0] + "-" + wheel.name.split("-")[1] + ".dist-info"}
    assert {Path(name).suffix for name in names if name.startswith("fairseq_moe_ext/")} <= {".py", ".so"}
    assert scripts.split("\n\n")[0].strip() == "[console_scripts]\nfairseq-moe = fairseq_moe_ext.command_line:main"
    for line in ("Author: The fairseq_moe_ext authors", "Description-Content-Type: text/markdown", "License: MIT"):
        assert f"\n{line}\n" in metadata
    assert "\nProvides-Extra: reproduce\n" in metadata
    if sys.platform == "linux" and kernels:  # without a compiler there is none
        assert not any(b".symtab" in kernel or b".debug" in kernel for kernel in kernels)  # stripped


def test_the_command_runs_without_the_checkout(installed, tmp_path):
    where = run(installed / "python", "-c", PACKAGE_FOLDER, cwd=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(installed.parent)
    help_ = run(installed / "fairseq-moe", "--help", cwd=tmp_path)
    assert help_.stdout.startswith("usage: fairseq-moe ")
    plan = run(installed / "fairseq-moe", "plan", "moe_transformer_nllb_54b", "--device-memory", "24GB", cwd=tmp_path)
    assert "12 MoE layers of 128 experts" in plan.stdout and "--expert-buffer-size" in plan.stdout
    wrong = run(installed / "fairseq-moe", "convert", "summary", "none.pt", cwd=tmp_path, check=False)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: none.pt") and wrong.stderr.count("\n") == 1


def test_fairseqs_command_serves_with_the_installed_package(installed, tmp_path):
    data = write_data(tmp_path / "data", ("en", "de"))
    untrained_checkpoint(tmp_path / "model.pt", data, *MT_TRAINING)
    user_dir = run(installed / "python", "-c", PACKAGE_FOLDER, cwd=tmp_path).stdout.strip()
    arguments = ("--path", tmp_path / "model.pt", "--task", "moe_translation", "-s", "en", "-t", "de", "--cpu")
    report = ("--moe-report", tmp_path / "report.json", "--user-dir", user_dir)
    served = run(installed / "python", "-m", "fairseq_cli.generate", data, *arguments, *report, cwd=tmp_path)
    assert served.stdout.count("\nH-") + served.stdout.startswith("H-") == 20 and "served: " in served.stderr
    assert (tmp_path / "report.json").is_file()
