"""Where the report, the trace and the record go: one file each, which rank 0 writes of what all ranks saw."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.group import Ranks
from fairseq_moe_ext.recording import Record, merge_records, save_record
from fairseq_moe_ext.reporting.exit_code import ExitCode
from fairseq_moe_ext.trace import PhaseTrace, merge_traces, save_trace

logger = logging.getLogger("fairseq_moe_ext")


class Outputs:
    """A path that is None is not asked for. interrupted: whether what the ranks saw so far is enough."""

    def __init__(
        self,
        report_path: str | None,
        trace_path: str | None,
        record_path: str | None,
        ranks: Ranks | None,
        exit_code: ExitCode,
    ):
        self._report_path, self._trace_path, self._record_path = report_path, trace_path, record_path
        self._ranks = ranks
        self._exit_code = exit_code
        self.interrupted = False

    @property
    def other_ranks(self) -> Sequence[int]:
        """Those from which rank 0 hears."""
        return range(1, 1 if self._ranks is None else self._ranks.world_size)

    def receive(self, ranks: Iterable[int], what: str) -> dict[int, bytearray]:
        """Rank -> what it sends next; left out: a rank that ended before, which does not take the results with it."""
        found = {}
        for rank in ranks:
            try:
                found[rank] = self._ranks.receive(rank)
            except ExchangeError as error:
                if not self.interrupted:
                    where = f"rank {rank} of {self._ranks.world_size}"
                    self._exit_code.fail(f"{where} ended before its {what} came, which is not written: {error}")
        return found

    def write_report(self, figures: Mapping[str, Any], ranks: Iterable[int]) -> None:
        """ranks: the others whose figures are in it."""
        if self._report_path and self._is_enough(ranks, "report"):
            with self._going_on():
                write_json(self._report_path, figures, "--moe-report")

    def write_trace(self, traces: Sequence[dict[str, PhaseTrace]], ranks: Iterable[int]) -> None:
        """traces: rank 0's, and those of the other `ranks`."""
        if not self._is_enough(ranks, "trace"):
            return
        with self._going_on():
            phases = merge_traces(traces)
            if phases:
                save_trace(self._trace_path, phases, "--moe-trace")
            else:
                logger.warning("--moe-trace %s is not written: nothing was routed by a dense model", self._trace_path)

    def write_record(self, records: Sequence[Record], ranks: Iterable[int]) -> None:
        """records: rank 0's, and those of the other `ranks`."""
        if self._is_enough(ranks, "record"):
            with self._going_on():
                save_record(self._record_path, merge_records(records), "--moe-record")

    def _is_enough(self, ranks: Iterable[int], what: str) -> bool:
        """Whether `what` is written of these other ranks: of all of them, or after an interruption."""
        missing = sorted({*self.other_ranks} - {*ranks})
        if missing and self.interrupted:
            named = ", ".join(map(str, missing))
            logger.warning("the %s lacks rank %s of %d, which had ended", what, named, len(self.other_ranks) + 1)
        return not missing or self.interrupted

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A file that cannot be written takes neither the results nor the other file with it, but the exit code."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._exit_code.fail(str(error))
