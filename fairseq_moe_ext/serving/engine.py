"""Continuous batching without fairseq's commands: requests come, are decoded side by side, and go, one by one.

    with fairseq_moe_ext.load("model.pt", ...) as served, served.engine(batch_size=32) as engine:
        requests = [engine.submit(text, beam=4) for text in sentences]
        engine.run()  # or, for as long as requests come: engine.wait(), engine.step()
        translations = [request.result()[0].text for request in requests]

A request's hypotheses are those of `fairseq-interactive` for its sentence alone, whichever requests share its steps.
Requests of one beam size share a decoder pass; other beam sizes have a pass of their own within the same step.
`submit`, `cancel` and a request's own methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairseq import utils
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from torch import Tensor

from fairseq_moe_ext.checkpoints.errors import ClosedError
from fairseq_moe_ext.decoding.requests import (
    Request,
    RequestMaker,
    Room,
    check_beam,
    check_gating,
    check_options,
    longest_output,
)
from fairseq_moe_ext.serving.engine_request import EngineRequest, Hypotheses
from fairseq_moe_ext.serving.keyword_options import OptionError
from fairseq_moe_ext.serving.language_pairs import LanguagePair, LanguagePairs
from fairseq_moe_ext.serving.request_decoder import RequestDecoder
from fairseq_moe_ext.serving.request_options import RequestOptions
from fairseq_moe_ext.serving.text import Hypothesis

if TYPE_CHECKING:
    from fairseq_moe_ext.serving.served import ServedParts


class FullError(Exception):
    """As many requests wait as may wait; later there is room again."""


class Engine:
    """Decodes the requests of one served translation model; made by `Served.engine`, which says what it may be told.

    lock: held while the model computes; whoever else uses the model holds it, too. keep: what must live as long.
    """

    def __init__(
        self,
        parts: ServedParts,
        cfg: DictConfig,
        lock: threading.RLock,
        max_waiting: int = 1024,
        max_beam: int | None = None,
        keep: Any = None,
    ):
        task = parts.task
        for name, value in (("max_waiting", max_waiting), ("max_beam", max_beam)):
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}")
        check_gating(task.args if hasattr(task, "args") else task.cfg)
        check_options(cfg.generation, parts.models)
        self._generation = cfg.generation
        generator = task.build_generator(parts.models, cfg.generation)
        self._vocab_size, self._longest = generator.vocab_size, generator.max_len
        self._positions = utils.resolve_max_positions(task.max_positions(), parts.models[0].max_positions())
        self._pairs = LanguagePairs(task, cfg.generation, parts.codec_of, parts.unnamed)
        self._words = len(task.source_dictionary)
        self._decoder = RequestDecoder(generator, parts.observer)
        self._room = Room(cfg.dataset.batch_size, cfg.dataset.max_tokens)
        self._max_waiting, self._max_beam = max_waiting, max_beam
        self._keep = keep
        self._computing = lock  # guards the decoder
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[EngineRequest] = deque()
        self._closed = False

    def submit(self, source: str | Sequence[int] | Tensor, /, **options: Any) -> EngineRequest:
        """Let one sentence be translated under `options` (request_options.py).

        source: a line of text, or its tokens (S,) with the end, to which is added what the command adds. The request's
        result is a list, best first: of Hypothesis for a text, for tokens of what fairseq's generators give.
        OptionError or another ValueError where it cannot be served; FullError; ClosedError.
        """
        asked = RequestOptions.read(options, self._generation)
        with self._changed:
            self._check_open()
        check_beam(asked.beam, self._vocab_size)
        if self._max_beam is not None and asked.beam > self._max_beam:
            raise OptionError(f"beam must be at most {self._max_beam} here, got {asked.beam}")
        pair = self._pairs.pair(asked.source_lang, asked.target_lang)
        batch = self._batch(self._tokens(source, pair), pair.task)
        length = batch.sample["net_input"]["src_tokens"].size(1)
        max_len = longest_output(asked.max_len_a, asked.max_len_b, length, self._longest, asked.search.min_len)

        def texts(hypotheses: Hypotheses) -> list[Hypothesis]:
            return [pair.codec.hypothesis(each, pair) for each in hypotheses]

        request = EngineRequest(batch, max_len, asked, texts if isinstance(source, str) else list)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self._max_waiting:
                self._drop_cancelled()
            if len(self._waiting) >= self._max_waiting:
                raise FullError(f"at most {self._max_waiting} requests may wait, and as many do")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: EngineRequest) -> bool:
        """Give a request up; False where it has its result already. Its room is free from the next step on."""
        return request.cancel()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    @property
    def pending(self) -> int:
        """Requests without a result, those that were cancelled since the last step included."""
        with self._changed:
            return len(self._waiting) + len(self._decoder.requests)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, at most `timeout` seconds, until a step has something to do or the engine is closed; whether it has."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._decoder.requests, timeout)
            return not self._closed and bool(self._waiting or self._decoder.requests)

    def step(self) -> int:
        """One decoder step of all that are under way, after waiting requests took what room there is.

        Returns how many requests have no result yet. What fails is a request's own result, never an error here.
        """
        with self._computing:
            self._admit()
            try:
                again = self._decoder.step()
            except BaseException:  # interrupted somewhere within: all that were under way begin anew
                self._put_back(self._decoder.give_up())
                raise
            self._put_back(again)
        return self.pending

    def run(self) -> None:
        """Step until every request has its result."""
        while self.step():
            pass

    def close(self) -> None:
        """Cancel what has no result and keep nothing; a step under way comes to its end before."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with self._computing, self._changed:
            for request in (*self._decoder.end(), *self._waiting):
                request.drop()
            self._waiting.clear()
            self._keep = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("an engine must be open, got a call after its close()")

    def _tokens(self, source: str | Sequence[int] | Tensor, pair: LanguagePair) -> Tensor:
        if isinstance(source, str):
            (tokens,), _ = pair.task.get_interactive_tokens_and_lengths([source.strip()], pair.codec.encode)
            return tokens
        try:
            tokens = torch.as_tensor(source)
        except (TypeError, ValueError, RuntimeError):
            tokens = torch.empty(0)
        if tokens.dim() != 1 or not tokens.numel() or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise ValueError(f"a sentence must be a text or a row of token numbers, got {source!r:.60}")
        if not bool(((tokens >= 0) & (tokens < self._words)).all()):
            raise ValueError(f"tokens must be numbers of the dictionary's {self._words} words, got {source!r:.60}")
        return tokens.long().cpu()

    def _batch(self, tokens: Tensor, task: FairseqTask) -> Request:
        """What the commands make of the sentence alone, tokens of languages included."""
        dataset = task.build_dataset_for_inference([tokens], [tokens.numel()])
        _, left_out = dataset.filter_indices_by_size(np.array([0]), self._positions)
        if len(left_out):
            raise ValueError(
                f"a sentence must have at most {self._positions[0]} tokens, the model's and the task's positions, "
                f"got {tokens.numel()}"
            )
        sample = dataset.collater([dataset[0]])
        return task.inference_step(RequestMaker(), [], sample)

    def _admit(self) -> None:
        """Waiting requests take what room there is, in their order."""
        new: list[EngineRequest] = []
        with self._changed:
            self._check_open()
            self._drop_cancelled()
            under_way = [request for request in self._decoder.requests if not request.cancelled()]
            while self._waiting:
                together = [*under_way, *new, self._waiting[0]]
                if len(together) > 1 and any(request.alone for request in together):
                    break
                if not self._room.has([request.tokens.numel() for request in together]):
                    break
                new.append(self._waiting.popleft())
            self._decoder.add(new)

    def _drop_cancelled(self) -> None:
        for request in [each for each in self._waiting if each.cancelled()]:
            self._waiting.remove(request)
            request.drop()

    def _put_back(self, requests: list[EngineRequest]) -> None:
        with self._changed:
            self._waiting.extendleft(reversed(requests))
