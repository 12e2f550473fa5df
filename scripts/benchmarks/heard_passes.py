"""What the MoE layers of a served model chose, token by token, and what their next layers' gates would have guessed.

Legend: T = tokens of a call, E = experts, K = choices per token, D = model dim, M = guesses kept per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fairseq_moe_ext.buffering.model_calls import ModelCall

MOST_GUESSED = 8  # M
INPUT, RESIDUAL = "next gate on this input", "next gate on the normed residual"


@dataclass(frozen=True)
class Guess:
    """Of a layer's next call: ranked (T, M) int64, each token's likeliest experts first; expected (E,) rows."""

    layer: str
    ranked: np.ndarray
    expected: np.ndarray


@dataclass
class HeardCall:
    """One call of one layer: tokens (T,) int64 that entered the stack, experts (T, K) int64 with -1 where none ran;
    languages: the language tokens of the batch's sources, one each; guesses: of the next MoE layer in the same pass, by
    what they are made from."""

    batch: int
    phase: str
    step: int
    layer: str
    num_experts: int
    tokens: np.ndarray
    experts: np.ndarray
    languages: tuple[int, ...] = ()
    guesses: dict[str, Guess] = field(default_factory=dict)

    def as_model_call(self) -> ModelCall:
        """As a trace has it."""
        chosen = self.experts[self.experts >= 0]
        return ModelCall(
            self.batch, self.phase, self.step, self.layer, np.bincount(chosen, minlength=self.num_experts)
        )


class Listener:
    """In the place of a model's record: hears of passes, and by hooks of gates and layers."""

    def __init__(self, model: torch.nn.Module, language_tokens: set[int]):
        self.calls: list[HeardCall] = []
        self._step = 0
        self._language_tokens, self._languages = language_tokens, ()
        self._pass: tuple[int, str, int, np.ndarray] | None = None
        self._hooks = []
        for side in ("encoder", "decoder"):
            stack = getattr(model, side, None)
            layers = [] if stack is None else list(enumerate(stack.layers))
            heard = [(f"{side}.layers.{number}.moe_layer", layer) for number, layer in layers if has_experts(layer)]
            for (name, layer), (next_name, following) in zip(heard, [*heard[1:], ("", None)], strict=False):
                self._watch(name, layer, next_name, following)

    def _watch(self, name: str, layer: torch.nn.Module, next_name: str, following: torch.nn.Module | None) -> None:
        def hear_gate(gate, inputs, routing) -> None:
            batch, phase, step, tokens = self._pass
            experts = routing.expert_ids.masked_fill(~routing.kept, -1).numpy()
            num_experts = gate.wg.weight.size(0)
            self.calls.append(HeardCall(batch, phase, step, name, num_experts, tokens, experts, self._languages))
            if following is not None:
                self.calls[-1].guesses[INPUT] = guess(next_name, following, inputs[0], routing.kept)

        def hear_layer(_layer, _inputs, output) -> None:
            residual = output[0] if isinstance(output, tuple) else output  # (L, B, D)
            residual = residual.transpose(0, 1).reshape(-1, residual.size(2))
            if following.normalize_before:
                residual = following.final_layer_norm(residual)
            kept = torch.from_numpy(self.calls[-1].experts >= 0)
            self.calls[-1].guesses[RESIDUAL] = guess(next_name, following, residual, kept)

        self._hooks.append(layer.moe_layer.gate.register_forward_hook(hear_gate))
        if following is not None:
            self._hooks.append(layer.register_forward_hook(hear_layer))

    def close(self) -> None:
        """Hear nothing more."""
        for hook in self._hooks:
            hook.remove()

    # what an observer tells a record
    def attach(self, *_told) -> None:
        """Nothing to do."""

    speak = begin_batch = hypotheses_end = attach

    def drop_pass(self) -> None:
        """A pass that broke off ends the measurement."""
        raise RuntimeError("a pass broke off")

    def begin_pass(self, stack: str, batch: int, tokens: Tensor, real: Tensor, incremental: bool) -> None:
        """As `Recorder.begin_pass`."""
        entering = tokens[:, -real.size(1) :].reshape(-1).numpy()
        phase = "encoder" if stack == "encoder" else "decode" if incremental else "prefill"
        if phase == "encoder":
            self._languages = tuple(token for token in tokens.reshape(-1).tolist() if token in self._language_tokens)
        self._pass = batch, phase, self._step, entering
        self._step += 1

    def end_pass(self) -> None:
        """It is done."""
        self._pass = None


def has_experts(layer: torch.nn.Module) -> bool:
    """Whether a transformer layer's feed-forward is a MoE layer."""
    return hasattr(layer, "moe_layer")


def guess(name: str, following: torch.nn.Module, tokens: Tensor, kept: Tensor) -> Guess:
    """What the gate of the layer `following` makes of tokens (T, D); kept (T, K): False where a token is padding."""
    gate = following.moe_layer.gate
    _, probabilities = gate.score(tokens)
    probabilities = probabilities.float().masked_fill(~kept[:, :1], 0)
    ranked = probabilities.topk(min(MOST_GUESSED, probabilities.size(1)), dim=1).indices
    return Guess(name, ranked.numpy(), (probabilities.sum(0) * gate.num_choices).numpy())


@contextmanager
def heard(served) -> Iterator[Listener]:
    """A served model's calls in this context; `served`: what `load` gave."""
    parts = served._parts
    words = parts.task.source_dictionary.symbols
    languages = {number for number, word in enumerate(words) if word.startswith("__") and word.endswith("__")}
    listener = Listener(parts.models[0], languages)
    parts.observer.record = listener
    try:
        yield listener
    finally:
        parts.observer.record = None
        listener.close()
