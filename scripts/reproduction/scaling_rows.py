"""The modelled steps of the published models: every system, number of ranks, gating and placement.

Legend: T = tokens of a rank, E = experts, R = ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.balancing.placement import contiguous
from fairseq_moe_ext.balancing.rules import rules_for
from fairseq_moe_ext.balancing.solvers import anti_correlation, greedy
from reproduction.cluster import System
from reproduction.layer_costs import LayerCosts, Shape
from reproduction.paper import paper_value
from reproduction.stacks import DECODER, ENCODER, LM, Stack
from reproduction.step_model import LayerTime, dynamic_layer, rest_of_step, rows_sent, static_layer, stretch

STEPS = 8  # modelled ones; their mean counts
LM_LENGTH, MT_LENGTH = 1024, 32  # tokens of a block and of a sentence: assumptions


def _published(key: str, layers: int) -> Shape:
    value = {name: paper_value(f"{key}.{name}") for name in (
        "experts", "model-dim", "hidden-dim", "moe-every", "vocabulary", "capacity")}
    return Shape(value["experts"], value["model-dim"], value["hidden-dim"], layers, layers // value["moe-every"],
                 value["vocabulary"], value["capacity"])


# of a stack; layers of the encoder or the decoder alone
SHAPES = {LM: _published("lm", 24), ENCODER: _published("mt", 24)}
SHAPE_OF = {LM: LM, ENCODER: ENCODER, DECODER: ENCODER}
# at the batches of the paper's characterisation; a decode step has one token of every sentence
TOKENS = {
    LM: paper_value("characterisation.lm.batch") * LM_LENGTH,
    ENCODER: paper_value("characterisation.mt.batch") * MT_LENGTH,
    DECODER: paper_value("characterisation.mt.batch"),
}


@dataclass(frozen=True)
class ScalingRow:
    """A modelled step; milliseconds, of all MoE layers by part, and of the rest of the model.

    placement: `contiguous` or `balanced`; of static gating it makes no difference. largest_share: of a layer's rows,
    those of the busiest rank, times R.
    """

    stack: str
    kind: str
    system: str
    ranks: int
    nodes: int
    tokens: int
    gating: str
    placement: str
    step_ms: float
    gate_ms: float
    move_ms: float
    exchange_ms: float
    experts_ms: float
    rest_ms: float
    largest_share: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens * self.ranks / self.step_ms * 1000


def scale_stack(
    stack: Stack, systems: Mapping[str, System], costs: Mapping[str, LayerCosts], ranks: Sequence[int]
) -> list[ScalingRow]:
    """Ranks that outnumber the experts are left out. Placements are fitted on the first half of the batches."""
    shape, tokens = SHAPES[SHAPE_OF[stack.kind]], TOKENS[stack.kind]
    stretched = [stretch(loads, shape.experts) for loads in stack.loads(per_step=stack.kind == DECODER)]
    halves = [(loads[: (len(loads) + 1) // 2], loads[(len(loads) + 1) // 2 :]) for loads in stretched]
    if min(len(held_out) for _, held_out in halves) == 0:
        raise ValueError(f"the routing must have at least 2 batches of {stack.title}, got 1")
    rows = []
    for count in (each for each in ranks if each <= shape.experts):
        even = [at for (at,) in contiguous(shape.experts, count)]
        fitted = [balanced(first, count, stack.kind) for first, _ in halves]
        for name, system in systems.items():
            carried = costs[SHAPE_OF[stack.kind]].on(system.device)
            rest = rest_of_step(tokens, carried, shape, stack.kind == DECODER, stack.kind != ENCODER)
            modelled = {("static", "contiguous"): static_layer(tokens, count, carried, system.network, shape)}
            for placement, places in (("contiguous", [even] * len(halves)), ("balanced", fitted)):
                modelled["dynamic", placement] = mean_time([
                    dynamic_layer(rows_sent(held_out, step, count, tokens), place, carried, system.network)
                    for place, (_, held_out) in zip(places, halves, strict=True)
                    for step in range(STEPS)
                ])
            for (gating, placement), layer in modelled.items():
                parts = [1000 * shape.moe_layers * part for part in
                         (layer.gate, layer.move, layer.exchange, layer.experts)]
                rows.append(ScalingRow(
                    stack.title, stack.kind, name, count, -(-count // system.network.ranks_per_node), tokens, gating,
                    placement, sum(parts) + 1000 * rest, *parts, 1000 * rest, layer.largest_share * count,
                ))
    return rows


def balanced(loads: np.ndarray, ranks: int, kind: str) -> list[int]:
    """Per expert its rank by the paper's method, on loads (B, E): greedy, for the MT decoder anti-correlation."""
    rules = rules_for(np.ones(loads.shape[1], dtype=np.int64), ranks)
    return (anti_correlation if kind == DECODER else greedy)(loads, rules).tolist()


def mean_time(layers: Sequence[LayerTime]) -> LayerTime:
    names = LayerTime.__dataclass_fields__
    return LayerTime(**{name: float(np.mean([getattr(layer, name) for layer in layers])) for name in names})
