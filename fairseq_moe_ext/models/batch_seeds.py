"""Random numbers by a batch's number, so that any number of ranks draws what one draws."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary

import torch

_STEP = 2_147_483_659  # a prime beyond the seeds that users give: two batches' or layers' do not meet
_SEEDS = 1 << 63


class Source(Protocol):
    """Draws from a stream of its own."""

    def seed(self, seed: int) -> None:
        """Draw from now on what `seed` gives."""


class BatchSeeds:
    """Seeds PyTorch's own numbers (sampling, retained dropout) and the sources registered here, before every batch.

    The first batch draws by `--seed` itself, as fairseq does. Without `--seed` PyTorch's own first seed is taken, which
    is one on all ranks.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._sources: WeakKeyDictionary[Source, int] = WeakKeyDictionary()  # which it does not keep

    def register(self, source: Source, seed: int) -> None:
        """Seed `source` before every batch, for the first one with `seed`."""
        self._sources[source] = seed

    def begin(self, batch: int) -> None:
        """What is drawn from here on belongs to batch number `batch` of all ranks'."""
        if self._first is None:
            self._first = torch.initial_seed()
        torch.manual_seed((self._first + batch * _STEP) % _SEEDS)
        self._seed_sources(batch)

    def _seed_sources(self, batch: int) -> None:
        for source, first in self._sources.items():
            source.seed((first + batch * _STEP) % _SEEDS)
