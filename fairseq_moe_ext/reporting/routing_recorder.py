"""Records which experts run every token of the batches that fairseq's scorer scores.

Legend: B = sentences, L = positions, T = tokens (B * L), K = choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor

from fairseq_moe_ext.gating.call import Call
from fairseq_moe_ext.gating.dispatcher import Dispatcher, Planned
from fairseq_moe_ext.gating.routing import Routing
from fairseq_moe_ext.reporting.routed_tokens import NONE, RoutedTokens, side_of


class RoutingRecorder:
    """log_probability: natural, of all tokens that were scored; tokens: how many. Of an ensemble the first model's
    layers are recorded."""

    def __init__(self) -> None:
        self.log_probability = 0.0
        self.tokens = 0
        self._sentences: list[int] = []
        self._lengths: dict[str, list[int]] = {}
        self._experts: dict[str, list[np.ndarray]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In this context every batch that SequenceScorer scores is recorded."""
        original = SequenceScorer.generate

        def generate(scorer, models, sample, **kwargs):
            with self._batch(models[0], sample, scorer.pad):
                hypotheses = original(scorer, models, sample, **kwargs)
            for best, *_ in hypotheses:
                self.log_probability += float(best["positional_scores"].double().sum())
                self.tokens += best["positional_scores"].numel()
            return hypotheses

        SequenceScorer.generate = generate
        try:
            yield
        finally:
            SequenceScorer.generate = original

    def routed_tokens(self) -> RoutedTokens:
        """What was recorded so far."""
        return RoutedTokens.of_batches(self._sentences, self._lengths, self._experts)

    @contextmanager
    def _batch(self, model: torch.nn.Module, sample: dict[str, Any], pad: int) -> Iterator[None]:
        net_input = sample["net_input"]
        inputs = {"decoder": net_input.get("prev_output_tokens", net_input["src_tokens"])}
        if "prev_output_tokens" in net_input:
            inputs["encoder"] = net_input["src_tokens"]
        real = {side: tokens.ne(pad) for side, tokens in inputs.items()}  # (B, L)
        self._sentences += sample["id"].tolist()
        for side, mask in real.items():
            self._lengths.setdefault(side, []).extend(mask.sum(dim=1).tolist())
        layers = model.moe_layers() if hasattr(model, "moe_layers") else {}
        kept = getattr(model, "kept_experts", None)
        numbers = {} if kept is None else {name: torch.tensor(each) for name, each in kept.layers.items()}
        before = {name: layer.dispatcher for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                tell = partial(self._add, name, real[side_of(name)].flatten(), numbers.get(name))
                layer.use(dispatcher=_Told(before[name], tell))
            yield
        finally:
            for name, layer in layers.items():
                layer.use(dispatcher=before[name])

    def _add(self, name: str, real: Tensor, numbers: Tensor | None, routing: Routing) -> None:
        """real: (T,) bool, False on padding; numbers: of a pruned layer's experts in the whole model; routing: of the T
        tokens, and of rows behind them that fill a batch up."""
        chosen = routing.expert_ids if numbers is None else numbers.to(routing.expert_ids.device)[routing.expert_ids]
        ran = chosen.masked_fill(~routing.kept, NONE)[: len(real)]
        self._experts.setdefault(name, []).append(ran[real].to("cpu", torch.int16).numpy())


class _Told:
    """A dispatcher that tells what it has planned."""

    def __init__(self, dispatcher: Dispatcher, tell: Callable[[Routing], None]):
        self._dispatcher, self._tell = dispatcher, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dispatcher, name)

    def plan(self, routing: Routing, call: Call) -> Planned:
        """As `Dispatcher` has it."""
        planned = self._dispatcher.plan(routing, call)
        self._tell(planned.routing)
        return planned
