"""Environments of the peers: packages put into a folder of their own, before the main environment's on the path.

PyTorch is not installed again: a peer's process sees the main environment's, the very same build. transformers 4.57.6
is the last known to route NLLB's tokens right; 5.x has the fast expert kernels. Peers of quantised products get a
virtual environment each, without what they depend on: the main environment has that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TRANSFORMERS_NLLB, TRANSFORMERS_MIXTRAL = "4.57.6", "5.23.0"
LLAMA_CPP, CTRANSLATE2 = ("llama-cpp-python==0.3.36",), ("ctranslate2==4.8.5",)
KT_KERNEL = "kt-kernel==0.7.2", "gguf==0.19.0"


class EnvironmentMissing(RuntimeError):
    """The packages cannot be installed here; says why."""


def transformers_environment(version: str, threads: int = 1, folder: Path = ROOT / "build") -> dict[str, str]:
    """Variables of a process that has this version of transformers, which is installed into `folder` once."""
    target = folder / f"transformers-{version}"
    if not target.is_dir():
        partial = folder / f"transformers-{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        print(f"installing transformers {version} into {target}, once", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", partial, "-c", ROOT / "constraints.txt"]
        done = subprocess.run([*command, f"transformers=={version}"], capture_output=True, text=True)
        if done.returncode != 0:
            raise EnvironmentMissing(f"transformers {version} cannot be installed here: {done.stderr.strip()[-300:]}")
        partial.rename(target)
    return {**main_environment(threads), "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}


def virtual_environment(requirements: tuple[str, ...], folder: Path, threads: int = 1) -> dict[str, str]:
    """Variables of a process that has these requirements, each `name==version`, which are installed into a virtual
    environment in `folder` once."""
    named = " ".join(requirements)
    target = folder / requirements[0]
    if not target.is_dir():
        partial = folder / f"{requirements[0]}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        print(f"installing {named} into {target}, once", file=sys.stderr)
        venv.create(partial, with_pip=True)
        command = [partial / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", *requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise EnvironmentMissing(f"{named} cannot be installed here: {done.stderr.strip()[-300:]}")
        partial.rename(target)  # its Python is not called any more, only its packages are read
    (packages,) = target.glob("lib/python*/site-packages")
    return {**main_environment(threads), "PYTHONPATH": str(packages)}


def main_environment(threads: int = 1) -> dict[str, str]:
    """Variables of a process of the main environment."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
