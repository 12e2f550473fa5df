"""The observer of a model that a Python program serves: nothing is left to the end of the process."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from fairseq_moe_ext.models.batch_seeds import BatchSeeds
from fairseq_moe_ext.ranks.program import ProgramRanks
from fairseq_moe_ext.reporting.exit_code import ExitCode
from fairseq_moe_ext.reporting.finite import NonFinite, Results
from fairseq_moe_ext.reporting.observer import Observer
from fairseq_moe_ext.reporting.recorder import Recorder

logger = logging.getLogger("fairseq_moe_ext")

_DRAWING = threading.Lock()  # PyTorch's own random numbers are one stream for the whole process


class ProgramObserver(Observer):
    """Writes report, trace and record when it is told to, and checks the results of every call by themselves.

    Under several ranks each watches its own batches, and hears at the end of a call of the others'.
    """

    def __init__(
        self,
        gating: str,
        report_path: str | None = None,
        trace_path: str | None = None,
        ranks: ProgramRanks | None = None,
        weight_error_rows: int = 0,
        record: Recorder | None = None,
    ):
        super().__init__(gating, report_path, trace_path, ranks, _LoggedFailures(), weight_error_rows, record)
        self.seeds = CallSeeds()
        self.writes = any(each is not None for each in (report_path, trace_path, record))
        self._at_exit = True  # the end of a call's batches is not the end of what is served
        self._before = self._begun = 0  # batches of earlier calls, of all ranks; of this call
        self._of_all = NonFinite()  # what all ranks had met by the end of the last call

    @contextmanager
    def call(
        self, draws: bool, seed: int | None, device: torch.device, languages: tuple[str, str] = ("", "")
    ) -> Iterator[None]:
        """Around one call's batches, which draw as the first ones of a command do.

        draws: whether they draw PyTorch's own random numbers, whose stream is the program's again afterwards. Calls of
        other models that draw, too, wait. languages: of the call's sources and targets. NotFiniteError where a result
        is no number.
        """
        if self.record is not None:
            self.record.speak(*languages)
        self._results = Results()
        self._before, self._begun = self._before + self._begun, 0
        self.seeds.restart(draws)
        if draws:
            with _DRAWING, torch.random.fork_rng([device] if device.type == "cuda" else []):
                if seed is not None:
                    torch.manual_seed(seed)
                yield
        else:
            yield
        self.check_results()

    def begin_batch(self, number: int | None = None) -> None:
        """Batch `number` of this call begins, of all ranks'; None: the next one."""
        number = self._begun if number is None else number
        self._begun += 1
        self._batch = self._before + number
        self.seeds.begin(number)

    def told(self) -> dict[str, Any]:
        """What other ranks must know of this one's part of a call, as plain data."""
        self._tell_of_non_finite(of_all=True)  # a result's passes are those of the rank that has it
        non_finite = asdict(self.report.non_finite)
        return {"results": asdict(self._results), "batches": self._begun, "non_finite": non_finite}

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """What all ranks have told of the call: its results are known as a whole."""
        results = [Results(**each["results"]) for each in told]
        self._results = Results(sum(each.served for each in results), [n for each in results for n in each.broken])
        self._begun = sum(each["batches"] for each in told)
        self._of_all = NonFinite()
        for each in told:
            self._of_all.add(NonFinite(**each["non_finite"]))

    def as_dict(self) -> dict:
        """The report of what was served so far, of all ranks, as `--moe-report` writes it."""
        if self._ranks is None:
            self.report.close()
            return self.report.as_dict()
        self.report.close(self._ranks.exchange)
        figures = self._ranks.gather(self.report.figures())
        report = copy.deepcopy(self.report)
        for each in figures[1:] if self._ranks.rank == 0 else ():
            report.add_rank(each)
        return self._ranks.gather(report.as_dict() if self._ranks.rank == 0 else None)[0]

    def write(self) -> None:
        """Report, trace and record to the files that were asked for; under several ranks all do it at once."""
        self._finish()

    @property
    def _gives_out_results(self) -> bool:
        return True

    def _not_finite(self) -> str:
        found = self._of_all or self.report.non_finite
        return found.describe(self.report.dtype, bool(self.report.layers))


class CallSeeds(BatchSeeds):
    """Seeds by the number of a batch within its call; PyTorch's own numbers only where the call draws them."""

    _draws = False

    def restart(self, draws: bool) -> None:
        """Another call begins."""
        self._first, self._draws = None, draws

    def begin(self, batch: int) -> None:
        """As `BatchSeeds.begin`; PyTorch's own numbers are seeded only for calls that draw."""
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
