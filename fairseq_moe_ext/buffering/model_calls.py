"""The calls of a recorded run's MoE layers, in the order in which the model made them.

Legend: E = experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.trace import PHASES, PhaseTrace


@dataclass(frozen=True)
class ModelCall:
    """One call of one layer; load (E,): rows of each expert. step: its number within the phase."""

    batch: int
    phase: str
    step: int
    layer: str
    load: np.ndarray

    def active(self) -> list[int]:
        """The experts with rows, by rising id."""
        return np.flatnonzero(self.load).tolist()


def model_calls(trace: Mapping[str, PhaseTrace]) -> list[ModelCall]:
    """All calls of a run; those without any token are left out."""
    found = []
    for phase, recorded in trace.items():
        for step, (batch, loads) in enumerate(zip(recorded.batch.tolist(), recorded.load, strict=True)):
            for name, load in zip(recorded.names, loads, strict=True):
                if load.any():
                    found.append(ModelCall(batch, phase, step, name, load))
    return sorted(found, key=lambda call: (call.batch, PHASES.index(call.phase), call.step))  # stable: layers in order


def following_layers(calls: Sequence[ModelCall]) -> list[str]:
    """Per call the layer that comes next as far as a model can know: decode steps go on for ever, the rest is fixed."""
    layers = {phase: list(dict.fromkeys(c.layer for c in calls if c.phase == phase)) for phase in PHASES}
    phases = [phase for phase in PHASES if layers[phase]]
    found = []
    for call in calls:
        ours = layers[call.phase]
        place = ours.index(call.layer) + 1
        if place < len(ours):
            found.append(ours[place])
        elif call.phase == "decode":
            found.append(ours[0])
        else:
            found.append(layers[phases[(phases.index(call.phase) + 1) % len(phases)]][0])
    return found
