"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton comes in: its kernels run on the CPU


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """The folder of upstream's recordings beside the repository; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "goldens"
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}")
    return folder
