"""Fixtures that every test may use."""

import gc
import logging
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairseq_moe_ext.torch_versions import has_grouped_mm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton comes in: its kernels run on the CPU


def pytest_configure() -> None:
    """A shell that runs in the background hands on that interrupts are ignored, and the commands would ignore them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """The imports' objects stay: the garbage collector need not go through all of them again and again (0.3 s)."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Older PyTorch has no grouped product: neither the tests marked so nor those with a "grouped-mm" can run."""
    if has_grouped_mm():
        return
    skip = pytest.mark.skip(reason=f"PyTorch {torch.__version__} has no grouped_mm")
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "'grouped-mm'" in repr(list(parameters.values())) or item.get_closest_marker("grouped_mm"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def logging_as_before():
    """Programs switch logging off for as long as their process lives; here that is all later tests."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """The folder of upstream's recordings beside the repository; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "goldens"
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_goldens(tmp_path_factory) -> Path:
    """The tiny models of tests/goldens, which every clone has, unpacked: each a folder as in `shared_goldens`."""
    folder = tmp_path_factory.mktemp("goldens")
    for file in sorted((Path(__file__).parent / "goldens").glob("tiny_*.tar.xz")):
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def golden_folder(request) -> Callable[[str], Path]:
    """A model's name -> its folder, of `tiny_goldens` or of `shared_goldens`; skips where those are missing."""

    def find(model: str) -> Path:
        return request.getfixturevalue("tiny_goldens" if model.startswith("tiny_") else "shared_goldens") / model

    return find
