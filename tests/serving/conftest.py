"""A bilingual model of the goldens, served from Python once per file."""

import pytest
from python_served import PIECES, lines_of

import fairseq_moe_ext as moe


@pytest.fixture(scope="module")
def bilingual(shared_goldens):
    folder = shared_goldens / "mt_plain"
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **PIECES) as served:
        yield served


@pytest.fixture(scope="module")
def lines(bilingual):
    return lines_of(bilingual)[:12]
