"""The engine's requests in encoder and decoder: those that share a step, and what comes of each. For one thread."""

from __future__ import annotations

from collections import defaultdict

import torch
from fairseq.data import data_utils
from fairseq.sequence_generator import SequenceGenerator

from fairseq_moe_ext.decoding.beam_steps import BeamSteps, best_first
from fairseq_moe_ext.decoding.generator import count_results, shared_encoder_output
from fairseq_moe_ext.decoding.requests import Sentence
from fairseq_moe_ext.reporting.finite import FiniteSearch, NotFiniteError
from fairseq_moe_ext.reporting.observer import Observer
from fairseq_moe_ext.serving.engine_request import EngineRequest


class RequestDecoder:
    """Decodes requests by the model of `generator`; those of one beam size share a decoder pass."""

    def __init__(self, generator: SequenceGenerator, observer: Observer):
        self._generator: SequenceGenerator | None = generator
        self._finite: FiniteSearch | None = FiniteSearch(generator)
        self._observer = observer
        self._sentences: dict[EngineRequest, Sentence | None] = {}  # under way; None: not encoded yet
        self._steps: dict[int, BeamSteps] = {}  # by beam size

    @property
    def requests(self) -> list[EngineRequest]:
        """Those under way, the oldest first."""
        return list(self._sentences)

    def give_up(self) -> list[EngineRequest]:
        """Nothing is under way any more; returns what was."""
        requests = self.requests
        self._sentences, self._steps = {}, {}
        return requests

    def end(self) -> list[EngineRequest]:
        """`give_up`, and let the model go."""
        self._generator = self._finite = None
        return self.give_up()

    def add(self, requests: list[EngineRequest]) -> None:
        """They begin with the next step."""
        self._sentences.update(dict.fromkeys(requests))

    @torch.no_grad()
    def step(self) -> list[EngineRequest]:
        """All that are under way take a decode step, new ones their first; those that are done get their results.

        Returns requests that have to begin again, each alone: the step that they shared failed, of which one may be
        the cause. What a request alone fails with is its result.
        """
        self._drop_cancelled()
        new = [request for request, sentence in self._sentences.items() if sentence is None]
        self._encode(new)
        entering: dict[int, list[Sentence]] = defaultdict(list)
        for request in new:
            if request in self._sentences:
                entering[request.options.beam].append(self._sentences[request])
        again: list[EngineRequest] = []
        for beam in sorted({*self._steps, *entering}):
            try:
                self._step_group(beam, entering[beam])
            except Exception as error:
                again += self._fail(beam, error)
        self._hand_out()
        return again

    def _drop_cancelled(self) -> None:
        for request in [each for each in self._sentences if each.cancelled()]:
            self._take_out(request)
            request.drop()

    def _take_out(self, request: EngineRequest) -> None:
        sentence = self._sentences.pop(request)
        if sentence is not None:
            sentence.done = True

    def _encode(self, requests: list[EngineRequest]) -> None:
        """In one pass; where that fails each alone, so that no request fails for another."""
        if not requests:
            return
        try:
            sentences = self._encoded(requests)
        except Exception as error:
            if len(requests) > 1:
                for request in requests:
                    self._encode([request])
            else:
                self._take_out(requests[0])
                requests[0].fail(error)
            return
        self._sentences.update(zip(requests, sentences, strict=True))

    def _encoded(self, requests: list[EngineRequest]) -> list[Sentence]:
        model, pad = self._generator.model, self._generator.pad
        self._observer.begin_batch()
        # padded as fairseq pads the sentences that it reads from a terminal
        device = next(model.parameters()).device
        src_tokens = data_utils.collate_tokens([each.tokens for each in requests], pad, left_pad=True).to(device)
        net_input = {"src_tokens": src_tokens, "src_lengths": src_tokens.ne(pad).sum(dim=1)}
        encoder_out = model.forward_encoder(net_input)[0]
        states, (padding,) = encoder_out["encoder_out"][0], encoder_out["encoder_padding_mask"]
        sentences = []
        for row, request in enumerate(requests):
            bos, prefix = request.source.bos_token, request.source.prefix_tokens
            sentences.append(
                Sentence(
                    source=states[~padding[row], row],
                    source_length=request.tokens.numel(),
                    max_len=request.max_len,
                    first_token=self._generator.eos if bos is None else bos,
                    prefix=[] if prefix is None else prefix[0].tolist(),
                    options=request.options.search,
                )
            )
        return sentences

    def _step_group(self, beam: int, entering: list[Sentence]) -> None:
        steps = self._steps.setdefault(beam, BeamSteps(self._generator, beam))
        with shared_encoder_output(self._generator.model.models, beam), self._finite.around():
            steps.admit(entering)
            if steps.live:
                steps.step()

    def _fail(self, beam: int, error: Exception) -> list[EngineRequest]:
        del self._steps[beam]
        requests = [request for request in self._sentences if request.options.beam == beam]
        for request in requests:
            self._take_out(request)
            request.alone = True
        if len(requests) > 1:
            return requests
        for request in requests:
            request.fail(error)
        return []

    def _hand_out(self) -> None:
        """What is done leaves."""
        done = [request for request, sentence in self._sentences.items() if sentence.done]
        if done:
            self._observer.count_broken_beams(self._finite.count())
        for request in done:
            hypotheses = best_first(self._sentences.pop(request).hypotheses)
            (hypotheses,) = self._finite.without_broken([hypotheses])
            count_results({}, [hypotheses], self._observer)
            self._observer.report.count_hypotheses([hypotheses])
            if hypotheses and bool(hypotheses[0]["positional_scores"].sum().isfinite()):
                request.finish(hypotheses[: request.options.nbest])
            else:
                report = self._observer.report
                why = report.non_finite.describe(report.dtype, bool(report.layers))
                request.fail(NotFiniteError(f"the translation is no number: {why}"))
        self._steps = {beam: steps for beam, steps in self._steps.items() if not steps.is_empty}
