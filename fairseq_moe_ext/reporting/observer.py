"""The one who watches a served model: times its passes, feeds the report, the trace and the record, and writes them at
the end."""

from __future__ import annotations

import atexit
import json
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from signal import Signals

import torch
from torch import Tensor

from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.checkpoints.loading import ModelState
from fairseq_moe_ext.gating.call import LayerCall
from fairseq_moe_ext.kernels.offsets import fetch
from fairseq_moe_ext.models.batch_seeds import BatchSeeds
from fairseq_moe_ext.ranks.group import Ranks
from fairseq_moe_ext.recording import pack_record, unpack_record
from fairseq_moe_ext.reporting.exit_code import ExitCode
from fairseq_moe_ext.reporting.finite import NonFinite, PassOutputs, Results
from fairseq_moe_ext.reporting.interrupts import on_interrupt
from fairseq_moe_ext.reporting.outputs import Outputs
from fairseq_moe_ext.reporting.recorder import Recorder
from fairseq_moe_ext.reporting.report import Report
from fairseq_moe_ext.reporting.start import kernel_in_words, warm_up
from fairseq_moe_ext.reporting.totals import PassTotals
from fairseq_moe_ext.reporting.weight_error import sample_layers
from fairseq_moe_ext.trace import TraceRecorder, pack_trace, unpack_trace

logger = logging.getLogger("fairseq_moe_ext")


class Observer:
    """Belongs to one served model. Batches are begun by the batch iterator, passes by the model's stacks.

    Under several ranks each has its own, and rank 0 writes one report, one trace and one record of what
    all of them saw.
    record: None: none is asked for.
    """

    def __init__(
        self,
        gating: str,
        report_path: str | None = None,
        trace_path: str | None = None,
        ranks: Ranks | None = None,
        exit_code: ExitCode | None = None,
        weight_error_rows: int = 0,
        record: Recorder | None = None,
    ):
        self.record = record
        self.report = Report(gating)
        self._ranks, self._weight_error_rows = ranks, weight_error_rows
        self._recorder = TraceRecorder() if trace_path else None
        self.has_model = False
        self.models = 0  # that are served together; of an ensemble one is watched
        self._batch = -1
        self._calls: list[tuple[str, LayerCall]] = []  # of the pass under way
        self._outputs = PassOutputs()  # of the pass under way
        self._results = Results()
        self._told_of_non_finite = False
        self._nothing_left: str | None = None
        # before `finish_at_exit`, hence after it when the process ends
        self._exit_code = ExitCode() if exit_code is None else exit_code
        record_path = None if record is None else record.path
        self._written = Outputs(report_path, trace_path, record_path, ranks, self._exit_code)
        self.seeds = BatchSeeds()
        self._kept: KeptExperts | None = None  # of a pruned model
        self._at_exit = False
        self._hears_interrupts = self._finished = False
        self._model: Callable[[], torch.nn.Module | None] = lambda: None  # a reference that does not keep it
        self._described: tuple[torch.device, torch.dtype] | None = None

    def weights_come(self, model, state: ModelState) -> None:
        """The model is loaded next, from `state`; ValueError where its experts' floats cannot be read again."""
        if self._weight_error_rows:
            self.report.samples = sample_layers(model.moe_layers(), state, self._weight_error_rows)

    def model_ready(self, model) -> None:
        """The model has its weights; also again, after it was prepared once more. What was counted so far stays."""
        self._model, self._kept = weakref.ref(model), getattr(model, "kept_experts", None)
        first = self._described is None
        self._describe(model)
        if self.record is not None:
            self.record.attach(model.moe_layers(), self._kept)
        warm_up()
        if first and self.report.layers and (self._ranks is None or self._ranks.rank == 0):
            logger.info(kernel_in_words(model.moe_layers(), self.report.dense_bytes_int8))

    def watch_dense(self, model) -> None:
        """One of fairseq's own models, which tells nothing: only what it comes to, its device and dtype are known."""
        self._model = weakref.ref(model)

    def _describe(self, model) -> None:
        parameter = next(model.parameters())
        self._described = parameter.device, parameter.dtype
        self.report.describe(model, model.moe_layers() if hasattr(model, "moe_layers") else {})

    def _is_on_gpu(self) -> bool:
        """Whether the model computes on a GPU now; the report hears where it has gone."""
        model = self._model()
        if model is None:
            return False
        parameter = next(model.parameters())
        if (parameter.device, parameter.dtype) != self._described:
            self._describe(model)
        return parameter.device.type == "cuda"

    def hear_interrupts(self) -> None:
        """From here on signals end this process with what it served so far told."""
        if self._at_exit or self._hears_interrupts:
            return
        self._hears_interrupts = True
        if on_interrupt(self._hear_of_interrupt, self._finish_interrupted) and self._ranks is not None:
            self._ranks.last_words = self._finish_alone

    def begin_batch(self, number: int | None = None) -> None:
        """Batch `number` of all ranks' begins; None: the next one."""
        self._batch = self._batch + 1 if number is None else number
        self._finished = False
        self.hear_interrupts()
        self.seeds.begin(self._batch)

    def begin_targets(self, targets: Tensor | None) -> None:
        """What the next passes are to say, (B, L), where that is known."""
        if self.record is not None:
            self.record.begin_batch(targets)

    def encoder_pass(self, tokens: Tensor, real: Tensor):
        """Context of one encoder pass over tokens (B, L); real (B, L) bool: False on padding."""
        return self._pass("encoder", self.report.encoder, tokens, real)

    def decoder_pass(self, tokens: Tensor, real: Tensor, incremental: bool):
        """Context of one decoder pass: a decode step, or a teacher-forced pass; tokens (B, L') so far, of which those
        of real (B, L) bool enter: False on padding."""
        return self._pass("decode" if incremental else "prefill", self.report.decoder, tokens, real)

    def hypotheses_end(self, rows: Sequence[int] | Tensor) -> None:
        """After these rows of the decoder's last pass a search chose the end of sentence."""
        if self.record is not None:
            self.record.hypotheses_end(rows)

    def layer_output(self, name: str, output: Tensor) -> None:
        """The transformer layer called `name` gives output (L, B, D) in the pass under way."""
        self._outputs.add(name, output)

    def count_broken_beams(self, number: int) -> None:
        """A search gave up so many rows of scores, which were no numbers."""
        if number:
            self.report.non_finite.beams += number
            self._tell_of_non_finite()

    def count_results(self, hypotheses: list[list[dict]], numbers: Sequence[int] | None = None) -> None:
        """Per sentence of a batch its hypotheses, as they are given out by one process or by rank 0.

        numbers: the sentences'; None: they go on counting.
        """
        self._is_on_gpu()
        if self._gives_out_results:
            if numbers is None:
                numbers = range(self._results.served, self._results.served + len(hypotheses))
            self.report.non_finite.results += self._results.add(hypotheses, numbers)
            self._tell_of_non_finite()

    @property
    def _gives_out_results(self) -> bool:
        return self._ranks is None or self._ranks.rank == 0

    def check_results(self) -> None:
        """Raise NotFiniteError where results that were given out are no numbers; for when all is written."""
        self._results.check(self._not_finite())

    def _tell_of_non_finite(self, of_all: bool = False) -> None:
        """of_all: the passes of all ranks are known; if no layer was wrong in any, what follows the last one was."""
        found = self.report.non_finite
        watched = self.report.layers and self.models <= 1
        if found and not found.first_layer and watched and (of_all or self._ranks is None):
            found.first_layer = "decoder.output_projection"
        if found and not self._told_of_non_finite:
            self._told_of_non_finite = True
            logger.warning(self._not_finite())

    def _not_finite(self) -> str:
        return self.report.non_finite.describe(self.report.dtype, bool(self.report.layers))

    def layer_hook(self, name: str) -> Callable[[LayerCall], None]:
        """What the MoE layer called `name` tells of every call."""

        return lambda call: self._calls.append((name, call))

    def _take_in_calls(self, phase: str) -> None:
        """What the layers told of a pass that is done."""
        if self._recorder is not None:
            self._recorder.begin_step(phase, max(self._batch, 0))
        for name, call in self._calls:
            if self._kept is not None:  # report and trace name experts as the whole model does
                before = self._kept.spread(name, call.load_before) if call.load_before else call.load_before
                call = replace(call, load=self._kept.spread(name, call.load), load_before=before)
            self.report.layers[name].add(call)
            if self._recorder is not None:
                self._recorder.add(name, list(call.load))
        self._calls.clear()

    def finish(self) -> None:
        """The last batch is done: write what was asked for and log one line. May be called again with more batches."""
        self._finished = True
        if not self._at_exit:
            self._finish()

    def _hear_of_interrupt(self, number: int) -> bool:
        """Whether the process ends now."""
        now = self._ranks is None or self._ranks.interrupt(number)
        self._written.interrupted |= now
        return now

    def _finish_interrupted(self) -> None:
        """The process ends by a signal in the middle of its batches: what was served so far is told."""
        if self._ranks is not None:
            self._finish_interrupted_ranks()
        elif self._written.interrupted and not self._finished and not self._at_exit:
            logger.warning("interrupted in batch %d: report and trace are of the passes before", self._batch)
            self._finish()

    def _finish_interrupted_ranks(self) -> None:
        """The same where all ranks broke off in one round, because of one rank's signal."""
        interrupted = self._ranks.exchange.interrupted
        if interrupted is None:
            if self._written.interrupted and not self._finished and self._ranks.rank == 0:
                self._finish_alone()
            return
        self._written.interrupted = True
        if self._ranks.rank == 0:
            where = (Signals(interrupted[1]).name, interrupted[0], self._ranks.world_size)
            logger.warning("interrupted by %s to rank %d of %d: report and trace are of the passes before", *where)
            self._ranks.receive_rest()
        self._finish()
        self._ranks.end()

    def _finish_alone(self) -> None:
        """Rank 0 was interrupted and then could not reach the others any more."""
        self._written.interrupted = True
        self._finish(range(0))

    @property
    def goes_on(self) -> bool:
        """Whether there will be batches after the last, until the process ends."""
        return self._at_exit

    def nothing_left(self, sentence: str) -> None:
        """Of some lines none can be served; where that is true of all, it is the process's failure."""
        logger.warning(sentence)
        self._nothing_left = sentence

    def finish_at_exit(self) -> None:
        """Finish once, when the process ends: fairseq-interactive comes to a last batch with every input."""
        if not self._at_exit:
            self._at_exit = True
            atexit.register(self._finish_and_check)

    def _finish_and_check(self) -> None:
        self._finish()
        if self._results.broken:
            self._exit_code.fail(self._not_finite())
        if self._nothing_left is not None and self._batch < 0:
            self._exit_code.fail(self._nothing_left)

    def _finish(self, others: Sequence[int] | None = None) -> None:
        """The report first, which a trace that cannot be written does not take with it. others: ranks to be asked."""
        self.report.close(None if self._ranks is None else self._ranks.exchange)
        if self._ranks is not None and self._ranks.rank > 0:
            self._ranks.send(json.dumps(self.report.figures()).encode())
            if self._recorder is not None:
                self._ranks.send(pack_trace(self._recorder.trace()))
            if self.record is not None:
                self._ranks.send(pack_record(self.record.record()))
            return
        every = self._written.other_ranks
        reports = self._written.receive(every if others is None else others, "report")
        for figures in reports.values():
            self.report.add_rank(json.loads(figures))
        self._tell_of_non_finite(of_all=len(reports) == len(every))
        self._written.write_report(self.report.as_dict(), reports)
        if self._recorder is not None:
            traces = self._written.receive(reports, "trace")
            self._written.write_trace([self._recorder.trace(), *map(unpack_trace, traces.values())], traces)
        if self.record is not None:
            records = self._written.receive(reports, "record")
            self._written.write_record([self.record.record(), *map(unpack_record, records.values())], records)
        logger.info(self.report.summary())

    @contextmanager
    def _pass(self, phase: str, totals: PassTotals, entering: Tensor, real: Tensor) -> Iterator[None]:
        """Nothing is counted of a pass that raises: whoever meets the error may try again."""
        tokens, on_gpu = int(real.sum()), self._is_on_gpu()
        fetched = self.report.buffer_totals()
        if self.record is not None:
            stack = "encoder" if phase == "encoder" else "decoder"
            self.record.begin_pass(stack, max(self._batch, 0), entering, real, phase == "decode")
        try:
            # a pass ends when the device has finished it, not when the host has queued it
            _synchronize(on_gpu)
            start = time.perf_counter()
            yield
            _synchronize(on_gpu)
            seconds = time.perf_counter() - start
            fetch([call.load for _, call in self._calls])  # of all layers together, once per pass, not within it
            not_finite = self._outputs.first_not_finite(real)
        except BaseException:
            self._calls.clear()
            self._outputs = PassOutputs()
            self.report.set_buffer_totals(fetched)
            if self.record is not None:
                self.record.drop_pass()
            raise
        totals.seconds += seconds
        totals.tokens += tokens
        totals.steps += 1
        self._take_in_calls(phase)
        if self.record is not None:
            self.record.end_pass()
        self.report.take_in_buffers()
        if not_finite is not None:
            self.report.non_finite.add(NonFinite(passes=1, first_layer=not_finite))
            self._tell_of_non_finite()


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
