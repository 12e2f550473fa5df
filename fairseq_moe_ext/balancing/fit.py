"""Fit a placement on the first half of a trace's batches and test it on the second.

Legend: B = batches (or steps), E = experts, R = ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.balancing.load import Balance, layer_load
from fairseq_moe_ext.balancing.placement import LayerPlacement
from fairseq_moe_ext.balancing.solve import Demand, evenness, solve
from fairseq_moe_ext.trace import PHASES, PhaseTrace, halve_trace

# a decoder's layers are in both of the last two where references were scored beside generation
DECODER_PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class MethodFit:
    """One method's placement of a layer, and how even it is on either half of the batches."""

    layer: LayerPlacement
    fitted: Balance
    held_out: Balance


@dataclass(frozen=True)
class LayerFit:
    """A layer by every method; `fitted` and `held_out` (B, E): the loads of either half.

    `bound`: no placement's Avg Max Load falls below it on the fitted half.
    """

    name: str
    phase: str
    methods: dict[str, MethodFit]
    bound: float
    fitted: np.ndarray
    held_out: np.ndarray


def phases_of_layers(trace: dict[str, PhaseTrace], decoder_phase: str | None = None) -> dict[str, str]:
    """The phase that each layer of a trace is fitted on, by the layer's name.

    An encoder's layer is in `encoder` only; a decoder's is fitted on `decoder_phase`, by default on `decode` where
    that was recorded, else on `prefill`. ValueError where the trace lacks the phase for a layer.
    """
    order = ("encoder", *(DECODER_PHASES if decoder_phase is None else (decoder_phase,)))
    layers: dict[str, str] = {}
    for name in dict.fromkeys(name for phase in PHASES if phase in trace for name in trace[phase].names):
        found = [phase for phase in order if phase in trace and name in trace[phase].names]
        if not found:
            raise ValueError(f"the phase must be one that the trace holds of {name}, got {decoder_phase}")
        layers[name] = found[0]
    return layers


def fit_layers(
    trace: dict[str, PhaseTrace],
    demand: Demand,
    objective: str = "tokens",
    per_step: bool = False,
    decoder_phase: str | None = None,
) -> Iterator[LayerFit]:
    """Every layer of the trace by every method, one after another; `objective` and `per_step` as `layer_load`'s.

    ValueError where a phase has too few batches, or the demand cannot be met.
    """
    if demand.replicas and objective == "active":
        raise ValueError(
            f"replicas must be 0 for the objective active, got {demand.replicas}: they share an expert's tokens, and "
            "each of them is active"
        )
    layers = phases_of_layers(trace, decoder_phase)
    first, second = halve_trace({phase: part for phase, part in trace.items() if phase in layers.values()})
    for name, phase in layers.items():
        fitted, held_out = (layer_load(half[phase], name, objective, per_step) for half in (first, second))
        yield _fit_layer(name, phase, fitted, held_out, demand)


def _fit_layer(name: str, phase: str, fitted: np.ndarray, held_out: np.ndarray, demand: Demand) -> LayerFit:
    solution = solve(fitted, demand)
    methods = {
        method: MethodFit(layer, *(evenness(half, layer, demand.world_size) for half in (fitted, held_out)))
        for method, layer in solution.methods.items()
    }
    return LayerFit(name, phase, methods, solution.bound, fitted, held_out)
