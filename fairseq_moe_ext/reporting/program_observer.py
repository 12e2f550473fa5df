"""The observer of a model that a Python program serves: nothing is left to the end of the process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fairseq_moe_ext.models.batch_seeds import BatchSeeds
from fairseq_moe_ext.reporting.exit_code import ExitCode
from fairseq_moe_ext.reporting.finite import Results
from fairseq_moe_ext.reporting.observer import Observer

logger = logging.getLogger("fairseq_moe_ext")

_DRAWING = threading.Lock()  # PyTorch's own random numbers are one stream for the whole process


class ProgramObserver(Observer):
    """Writes report and trace when it is told to, and checks the results of every call by themselves."""

    def __init__(self, gating: str, report_path: str | None = None, trace_path: str | None = None):
        super().__init__(gating, report_path, trace_path, exit_code=_LoggedFailures())
        self.seeds = CallSeeds()
        self._at_exit = True  # the end of a call's batches is not the end of what is served
        self._writes = report_path is not None or trace_path is not None

    @contextmanager
    def call(self, draws: bool, seed: int | None, device: torch.device) -> Iterator[None]:
        """Around one call's batches, which draw as the first ones of a command do.

        draws: whether they draw PyTorch's own random numbers, whose stream is the program's again afterwards. Calls of
        other models that draw, too, wait. NotFiniteError where a result is no number.
        """
        self._results = Results()
        self.seeds.restart(draws)
        if draws:
            with _DRAWING, torch.random.fork_rng([device] if device.type == "cuda" else []):
                if seed is not None:
                    torch.manual_seed(seed)
                yield
        else:
            yield
        self.check_results()

    def as_dict(self) -> dict:
        """The report of what was served so far, as `--moe-report` writes it."""
        self.report.close()
        return self.report.as_dict()

    def write(self) -> None:
        """Report and trace to the files that were asked for."""
        if self._writes:
            self._finish()


class CallSeeds(BatchSeeds):
    """Seeds by the number of a batch within its call; PyTorch's own numbers only where the call draws them."""

    _draws = False
    _next = 0

    def restart(self, draws: bool) -> None:
        """Another call begins."""
        self._first, self._draws, self._next = None, draws, 0

    def begin(self, batch: int) -> None:
        batch, self._next = self._next, self._next + 1
        if self._draws:
            super().begin(batch)
        else:
            self._seed_sources(batch)


class _LoggedFailures(ExitCode):
    """A file that cannot be written does not end the program."""

    def __init__(self) -> None:
        pass

    def fail(self, message: str) -> None:
        logger.error(message)
