"""The loads of a trace by stack: an encoder's layers, a decoder's, a language model's.

Legend: S = steps (an encoder's or a teacher-forced pass, or a decode step), B = batches, E = experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.balancing.fit import phases_of_layers
from fairseq_moe_ext.balancing.load import layer_load
from fairseq_moe_ext.balancing.placement import LayerPlacement
from fairseq_moe_ext.balancing.rules import rules_for
from fairseq_moe_ext.balancing.solvers import anti_correlation, greedy
from fairseq_moe_ext.trace import PhaseTrace
from reproduction.models import QUICKSTART_NAMES, Model

LM, ENCODER, DECODER = "LM", "MT encoder", "MT decoder"


@dataclass(frozen=True)
class Stack:
    """One model's layers on one side. kind: LM, ENCODER or DECODER; steps: per layer loads (S, E) int64."""

    model: str
    kind: str
    phase: str
    steps: Mapping[str, np.ndarray]
    batches: Mapping[str, np.ndarray]  # the same with a batch's steps added up, (B, E)

    @property
    def title(self) -> str:
        return self.kind if self.model in QUICKSTART_NAMES else f"{self.model.replace('_', ' ')}: {self.kind}"

    @property
    def num_experts(self) -> int:
        return next(iter(self.steps.values())).shape[1]

    def loads(self, per_step: bool) -> list[np.ndarray]:
        return list((self.steps if per_step else self.batches).values())


def stacks_of(model: Model, trace: Mapping[str, PhaseTrace]) -> list[Stack]:
    """A decoder's layers by their decode steps where those were recorded, else by teacher-forced passes."""
    layers: dict[str, dict[str, str]] = {}
    for name, phase in phases_of_layers(dict(trace)).items():
        layers.setdefault(phase, {})[name] = phase
    stacks = []
    for phase, names in layers.items():
        kind = LM if not model.translates else ENCODER if phase == "encoder" else DECODER
        loads = [
            {name: layer_load(trace[phase], name, per_step=per_step) for name in names} for per_step in (True, False)
        ]
        stacks.append(Stack(model.name, kind, phase, *loads))
    return stacks


def papers_method(kind: str) -> str:
    """The method that places a stack's experts: greedy; for the MT decoder anti-correlation."""
    return "anti-correlation" if kind == DECODER else "greedy"


def balanced(loads: np.ndarray, ranks: int, kind: str) -> LayerPlacement:
    """Per expert its rank, by the paper's method on loads (B, E)."""
    rules = rules_for(np.ones(loads.shape[1], dtype=np.int64), ranks)
    return rules.layer((anti_correlation if kind == DECODER else greedy)(loads, rules))
