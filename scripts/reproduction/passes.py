"""One batch through a served model under each gating: milliseconds of a pass by part, tokens, peak of memory.

All gatings run in one process over the same weights and in turn, round after round. `dense`: the same transformer with
one feed-forward in each MoE layer's place, whose expert it is as large as.

Legend: T = tokens, E = experts, K = choices, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch.nn.functional as F
from fairseq import checkpoint_utils, tasks
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor, nn

from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.dispatcher import Local
from fairseq_moe_ext.gating.slots import Slots, StaticOptions, dispatcher_for
from fairseq_moe_ext.models.served_model import ServedModel
from fairseq_moe_ext.reporting.report import Report
from reproduction.memory_peak import peak_bytes
from reproduction.models import Model, arguments_of, configuration
from reproduction.stacks import DECODER, ENCODER, LM

DENSE, STATIC, SPARSE, DYNAMIC = "dense", "static", "sparse static", "dynamic"
GATINGS = (DENSE, STATIC, SPARSE, DYNAMIC)
# the parts of a layer's call, by the report's
PARTS = {
    "gate": ("gate", "capacity"),
    "dispatch": ("dispatch",),
    "exchange": ("sizes", "exchange"),
    "experts": ("experts",),
    "combine": ("combine",),
}
STEPS = 16  # of every translation, so that all gatings decode alike
ROUNDS, SECONDS = 3, 0.7  # at least; seconds per gating


@dataclass(frozen=True)
class Pass:
    """A pass of one stack: an encoder's or a language model's pass, or a decode step, the mean of a batch's.

    tokens: that enter it. milliseconds: the median over rounds; parts: of its MoE layers together, by PARTS.
    peak_bytes: the most that the whole batch's tensors took at a time, the model's own not counted; parameter_bytes:
    of the model. waste_factor: static gating's slots over the assignments, E * C / K of the paper.
    """

    model: str
    stack: str
    gating: str
    batch: int
    tokens: float
    milliseconds: float
    parts: dict[str, float]
    peak_bytes: int
    parameter_bytes: int
    waste_factor: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.tokens / self.milliseconds

    @property
    def rest(self) -> float:
        """Milliseconds outside the MoE layers."""
        return self.milliseconds - sum(self.parts.values())


class Dense(nn.Module):
    """In a MoE layer's place; x (B, L, D) -> (B, L, D). The weights are random, what they cost is not."""

    def __init__(self, layer: MOELayer):
        super().__init__()
        self.dispatcher = Local()  # which the transformer's layer asks for: padding is no matter here
        model_dim, values = layer.experts.model_dim, layer.experts.expert_bytes // layer.experts.dtype.itemsize
        hidden_dim = (values - model_dim) // (2 * model_dim + 1)  # values = 2 * D * F + F + D
        self.fc1, self.fc2 = nn.Linear(model_dim, hidden_dim), nn.Linear(hidden_dim, model_dim)
        self.to(layer.experts.device, layer.experts.dtype).requires_grad_(False)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, decoding: bool = False) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Batches:
    """A served model and its data. capacity_fraction: static gating's slots of an expert over a batch's tokens."""

    def __init__(self, model: Model, subset: str, capacity_fraction: float):
        cfg = configuration(arguments_of(model, subset), model.translates)
        self._name, self._translates, self._fraction = model.name, model.translates, capacity_fraction
        self._task = tasks.setup_task(cfg.task)
        (self._model,), saved, self._task = checkpoint_utils.load_model_ensemble_and_task(
            [cfg.common_eval.path], task=self._task
        )
        if not (isinstance(self._model, ServedModel) and self._model.moe_layers()):
            raise ValueError(f"--checkpoint must have MoE layers, {model.checkpoint} has none")
        self._model.eval()
        self._model.prepare_for_inference_(cfg)
        self._task.load_dataset(subset, task_cfg=saved.task)
        self._data = self._task.dataset(subset)
        if model.translates:
            self._generator = self._task.build_generator([self._model], cfg.generation)
            self._generator.min_len = self._generator.max_len_b = STEPS
            self._generator.max_len_a = 0
        else:
            self._generator = SequenceScorer(self._task.target_dictionary)

    def measure(self, rows: int, gatings: Sequence[str]) -> list[Pass]:
        """A batch of `rows` sentences or blocks of the data's median length, under each gating."""
        batch = self._batch(rows)
        peaks, sizes, taken = {}, {}, {gating: [] for gating in gatings}
        for gating in gatings:
            with self._gated(gating):
                peaks[gating], sizes[gating] = peak_bytes(lambda: self._serve(batch)), self._parameter_bytes()
        end = time.perf_counter() + SECONDS * len(gatings)
        while len(taken[gatings[0]]) < ROUNDS or time.perf_counter() < end:
            for gating in gatings:
                with self._gated(gating):
                    taken[gating].append(self._figures(batch))
        layer = next(iter(self._model.moe_layers().values()))
        waste_factor = layer.experts.num_experts * self._fraction / layer.gate.num_choices
        return [
            Pass(self._name, stack, gating, rows, *_medians(rounds, stack), peaks[gating], sizes[gating], waste_factor)
            for gating, rounds in taken.items()
            for stack in rounds[0]
        ]

    def _batch(self, rows: int) -> dict:
        order = self._data.ordered_indices()
        first = max(0, (len(order) - rows) // 2)
        return self._data.collater([self._data[int(order[(first + row) % len(order)])] for row in range(rows)])

    def _serve(self, batch: dict) -> None:
        if self._translates:
            self._task.inference_step(self._generator, [self._model], batch)
        else:
            self._generator.generate([self._model], batch)

    def _figures(self, batch: dict) -> dict[str, dict]:
        """Per stack its passes' tokens, seconds and the seconds of its layers' parts, each by pass."""
        observer = self._task.observer
        observer.report = Report(observer.report.gating)
        observer.model_ready(self._model)
        self._serve(batch)
        report, found = observer.report, {}
        for stack, prefix, totals in (
            (ENCODER, "encoder.", report.encoder),
            (DECODER if self._translates else LM, "decoder.", report.decoder),
        ):
            if totals.steps:
                layers = [layer for name, layer in report.layers.items() if name.startswith(prefix)]
                parts = {
                    part: sum(layer.seconds.get(name, 0.0) for layer in layers for name in names) / totals.steps
                    for part, names in PARTS.items()
                }
                each = {"tokens": totals.tokens / totals.steps, "seconds": totals.seconds / totals.steps}
                found[stack] = {**each, "parts": parts}
        return found

    def _parameter_bytes(self) -> int:
        layers = self._model.moe_layers()
        others = sum(
            parameter.nbytes
            for name, parameter in self._model.named_parameters()
            if not any(name.startswith(f"{layer}.experts.") for layer in layers)
        )
        return others + sum(layer.experts.total_bytes for layer in layers.values())

    @contextmanager
    def _gated(self, gating: str) -> Iterator[None]:
        """The model's layers under another gating."""
        layers = self._model.moe_layers()
        before = {name: layer.dispatcher for name, layer in layers.items()}
        for name, layer in layers.items():
            if gating == DENSE:
                self._replace(name, Dense(layer))
            else:
                options = StaticOptions(self._fraction, sparse=gating == SPARSE)
                if isinstance(layer.dispatcher, Slots):
                    options = replace(layer.dispatcher.options, capacity_fraction=self._fraction, max_positions=None)
                    options = replace(options, sparse=gating == SPARSE)
                layer.use(dispatcher=dispatcher_for(DYNAMIC if gating == DYNAMIC else STATIC, options))
        try:
            yield
        finally:
            for name, layer in layers.items():
                self._replace(name, layer)
                layer.use(dispatcher=before[name])

    def _replace(self, name: str, layer: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, layer)


def _medians(rounds: Sequence[dict], stack: str) -> tuple[float, float, dict[str, float]]:
    """tokens, milliseconds and parts of one stack."""
    seconds = [each[stack]["seconds"] for each in rounds]
    middle = sorted(rounds, key=lambda each: each[stack]["seconds"])[len(rounds) // 2][stack]
    parts = {part: 1000 * taken for part, taken in middle["parts"].items()}
    return middle["tokens"], 1000 * statistics.median_high(seconds), parts
