"""Fixtures that every test may use."""

import gc
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton comes in: its kernels run on the CPU


def pytest_collection_finish() -> None:
    """The imports' objects stay: the garbage collector need not go through all of them again and again (0.3 s)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """The folder of upstream's recordings beside the repository; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "goldens"
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}")
    return folder
