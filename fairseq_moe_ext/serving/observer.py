"""The one who watches a served model: times its passes, feeds the report and the trace, writes both at the end."""

from __future__ import annotations

import atexit
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.gating.device_counts import fetch
from fairseq_moe_ext.gating.layer import LayerCall
from fairseq_moe_ext.serving.ranks import Ranks
from fairseq_moe_ext.serving.report import Report
from fairseq_moe_ext.serving.totals import PassTotals
from fairseq_moe_ext.trace import TraceRecorder, merge_traces, pack_trace, save_trace, unpack_trace

logger = logging.getLogger("fairseq_moe_ext")


class Observer:
    """Belongs to one served model. Batches are begun by the batch iterator, passes by the model's stacks.

    Under several ranks each has its own, and rank 0 writes one report and one trace of what all of them saw.
    """

    def __init__(
        self,
        gating: str,
        report_path: str | None = None,
        trace_path: str | None = None,
        ranks: Ranks | None = None,
    ):
        self.report = Report(gating)
        self._ranks = ranks
        self._report_path = report_path
        self._trace_path = trace_path
        self._recorder = TraceRecorder() if trace_path else None
        self.has_model = False
        self._batch = -1
        self._calls: list[tuple[str, LayerCall]] = []  # of the pass under way
        self._at_exit = False
        self._on_gpu = False

    def model_ready(self, model) -> None:
        """The model has its weights, dtype and device."""
        self.report.describe(model, model.moe_layers())
        self._on_gpu = self.report.device.startswith("cuda")

    def begin_batch(self, number: int | None = None) -> None:
        """Batch `number` of all ranks' begins; None: the next one."""
        self._batch = self._batch + 1 if number is None else number

    def encoder_pass(self, tokens: int):
        """Context of one encoder pass that `tokens` enter."""
        return self._pass("encoder", self.report.encoder, tokens)

    def decoder_pass(self, tokens: int, incremental: bool):
        """Context of one decoder pass that `tokens` enter: a decode step, or a teacher-forced pass."""
        return self._pass("decode" if incremental else "prefill", self.report.decoder, tokens)

    def layer_hook(self, name: str) -> Callable[[LayerCall], None]:
        """What the MoE layer called `name` tells of every call."""

        return lambda call: self._calls.append((name, call))

    def _take_in_calls(self) -> None:
        """What the layers told; their counts come from the device together, once per pass, not within it."""
        fetch([call.load for _, call in self._calls])
        for name, call in self._calls:
            self.report.layers[name].add(call)
            if self._recorder is not None:
                self._recorder.add(name, list(call.load))
        self._calls.clear()

    def finish(self) -> None:
        """The last batch is done: write what was asked for and log one line. May be called again with more batches."""
        if not self._at_exit:
            self._finish()

    def finish_at_exit(self) -> None:
        """Finish once, when the process ends: fairseq-interactive comes to a last batch with every input."""
        if not self._at_exit:
            self._at_exit = True
            atexit.register(self._finish)

    def _finish(self) -> None:
        phases = self._recorder.trace() if self._recorder is not None else {}
        self.report.close(None if self._ranks is None else self._ranks.exchange)
        if self._ranks is not None:
            if self._ranks.rank > 0:
                self._ranks.publish("report", json.dumps(self.report.figures()).encode())
                self._ranks.publish("trace", pack_trace(phases))
                return
            for rank in range(1, self._ranks.world_size):
                self.report.add_rank(json.loads(self._ranks.read("report", rank)))
            others = [unpack_trace(self._ranks.read("trace", rank)) for rank in range(1, self._ranks.world_size)]
            phases = merge_traces([phases, *others])
        if self._trace_path:
            if phases:
                save_trace(self._trace_path, phases, "--moe-trace")
            else:
                logger.warning("--moe-trace %s is not written: nothing was routed by a dense model", self._trace_path)
        if self._report_path:
            write_json(self._report_path, self.report.as_dict(), "--moe-report")
        logger.info(self.report.summary())

    @contextmanager
    def _pass(self, phase: str, totals: PassTotals, tokens: int) -> Iterator[None]:
        if self._recorder is not None:
            self._recorder.begin_step(phase, max(self._batch, 0))
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        totals.seconds += time.perf_counter() - start
        totals.tokens += tokens
        totals.steps += 1
        self._take_in_calls()

    def _synchronize(self) -> None:
        # a pass ends when the device has finished it, not when the host has queued it
        if self._on_gpu:
            torch.cuda.synchronize()
