"""What `--moe-record` asks for: watches the experts' inputs and the gates' choices of a served model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from torch import Tensor

from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.experts.called_by_counts import CalledByCounts
from fairseq_moe_ext.experts.watched_inputs import WatchedInputs
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.watched_choices import StackPass, WatchedChoices
from fairseq_moe_ext.recording import Choices, Inputs, LayerRecord, Record


@dataclass(frozen=True)
class _Watched:
    """One MoE layer."""

    inputs: WatchedInputs
    choices: WatchedChoices


class Recorder:
    """Of one model, whose observer tells it of passes; changes no result.

    path: of the file. end: the end of sentence's number in the decoder's dictionary. languages: of the sources and of
    the targets; both "" for a language model.
    """

    def __init__(self, path: str, end: int, languages: tuple[str, str]):
        self.path = path
        self._end = end
        self._languages = languages
        self._known: list[str] = []
        self._layers: dict[str, _Watched] = {}
        self._kept: KeptExperts | None = None
        self._under_way: list[WatchedChoices] = []
        self._batch = -1
        self._seen: dict[str, int] = {}  # tokens of the batch, by stack
        self._targets: Tensor | None = None

    def attach(self, layers: Mapping[str, MOELayer], kept: KeptExperts | None = None) -> None:
        """Watch these layers, by their names in the checkpoint; once more changes nothing. kept: of a pruned model,
        whose record names experts as the whole model does."""
        self._kept = kept
        for name, layer in layers.items():
            experts = layer.experts
            if name not in self._layers and isinstance(experts, CalledByCounts):
                dims = experts.num_experts, experts.model_dim, experts.hidden_dim
                inputs = WatchedInputs(*dims, experts.local, experts.activation)
                experts.watch(inputs)
                self._layers[name] = _Watched(inputs, WatchedChoices(layer.gate))

    def speak(self, source: str, target: str) -> None:
        """Of what languages the passes are from here on."""
        self._languages = source, target

    def begin_batch(self, targets: Tensor | None) -> None:
        """targets (B, L): what a language model is to say at every position, where that is known."""
        self._targets = targets

    def begin_pass(self, stack: str, batch: int, tokens: Tensor, real: Tensor, incremental: bool) -> None:
        """A pass of the `stack`, encoder or decoder: tokens (B, L') that it is given, of which the last real.shape[1]
        enter; real (B, L) bool, False on padding."""
        if batch != self._batch:
            self._batch, self._seen = batch, {}
        first = self._seen.get(stack, 0)
        self._seen[stack] = first + real.numel()
        live = self._live(tokens) if incremental else None
        ends = self._ends(real) if stack == "decoder" and not incremental else None
        marks = (None if each is None else each.reshape(-1) for each in (live, ends))
        stack_pass = StackPass(self._number_of(stack), batch, first, real.numel(), *marks)
        self._under_way = [each.choices for name, each in self._layers.items() if name.startswith(f"{stack}.")]
        for choices in self._under_way:
            choices.begin(stack_pass)

    def end_pass(self) -> None:
        """It is done."""
        for choices in self._under_way:
            choices.end()

    def drop_pass(self) -> None:
        """It broke off, and its tokens count nowhere; their rows may already have, in the experts' inputs."""
        for choices in self._under_way:
            choices.drop()

    def hypotheses_end(self, rows: Sequence[int] | Tensor) -> None:
        """After these rows of the decoder's last pass a search chose the end of sentence."""
        for name, watched in self._layers.items():
            if name.startswith("decoder."):
                watched.choices.hypotheses_end(rows)

    def record(self) -> Record:
        """What was recorded so far."""
        languages = len(self._known)
        layers = {
            name: LayerRecord(*watched.inputs.result(), *watched.choices.result(languages))
            for name, watched in self._layers.items()
        }
        if self._kept is not None:
            layers = {name: _of_whole_model(layer, name, self._kept) for name, layer in layers.items()}
        return Record(tuple(self._known), layers)

    def _number_of(self, stack: str) -> int:
        language = self._languages[stack == "decoder"]
        if language not in self._known:
            self._known.append(language)
        return self._known.index(language)

    def _live(self, tokens: Tensor) -> Tensor | None:
        """(B,) bool: False on beams that ended, with which a search may go on where it samples."""
        return None if tokens.size(1) == 1 else ~tokens[:, 1:].eq(self._end).any(1)

    def _ends(self, real: Tensor) -> Tensor | None:
        """(B, L) bool: where a teacher-forced pass is to emit the end of sentence."""
        if self._languages[1]:  # a translation's last token
            return real & real.flip(1).cumsum(1).flip(1).eq(1)
        targets = self._targets
        return None if targets is None or targets.shape != real.shape else real & targets.eq(self._end)


def _of_whole_model(layer: LayerRecord, name: str, kept: KeptExperts) -> LayerRecord:
    """With nothing of the experts that were not there."""

    def inputs(found: Inputs) -> Inputs:
        return Inputs(*(kept.spread_array(name, getattr(found, each.name)) for each in fields(Inputs)))

    choices = Choices(
        *(kept.spread_array(name, getattr(layer.choices, each.name), axis=1) for each in fields(Choices))
    )
    numbers = np.array(kept.layers[name], np.int32)
    sample = replace(layer.sample, experts=numbers[layer.sample.experts])
    return LayerRecord(inputs(layer.fc1), inputs(layer.fc2), choices, sample)
