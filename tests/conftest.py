"""Fixtures that every test may use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """The folder of upstream's recordings beside the repository; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "goldens"
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}")
    return folder
