"""The time of a step on R ranks, from recorded routing and measured costs, and the rows of the published models' steps.

Its assumptions: docs/scaling_model.md.

Legend: T = tokens of a rank, E = experts, K = choices per token, C = slots per expert, D = model dim, R = ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.balancing.load import shares
from fairseq_moe_ext.balancing.placement import contiguous
from reproduction.cluster import Network, System
from reproduction.layer_costs import K, LayerCosts, Shape, static_slots
from reproduction.paper import paper_value
from reproduction.stacks import DECODER, ENCODER, LM, Stack, balanced

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
class LayerTime:
    """Seconds of one MoE layer by part. gate: and for static gating its mask; move: rows into order and back.

    largest_share: of all rows, those of the busiest rank.
    """

    gate: float
    move: float
    exchange: float
    experts: float
    largest_share: float

    @property
    def seconds(self) -> float:
        return self.gate + self.move + self.exchange + self.experts


def stretch(loads: np.ndarray, experts: int) -> np.ndarray:
    """Shares (B', experts) of recorded loads (B, E): each expert stands for its neighbours, which share evenly.

    A recorded rank's share under contiguous placement stays what it was.

    >>> stretch(np.array([[3, 1]]), 4).tolist()
    [[0.375, 0.375, 0.125, 0.125]]
    """
    recorded = shares(loads)
    edges = np.linspace(0, recorded.shape[1], experts + 1)
    cumulative = np.concatenate([np.zeros((len(recorded), 1)), recorded.cumsum(axis=1)], axis=1)
    at_edges = np.stack([np.interp(edges, np.arange(cumulative.shape[1]), row) for row in cumulative])
    return np.diff(at_edges, axis=1)


def rows_sent(batch_shares: np.ndarray, step: int, ranks: int, tokens: int) -> np.ndarray:
    """(R, E) rows that each rank sends to each expert in a step: rank r has recorded batch step * R + r, round."""
    batches = (step * ranks + np.arange(ranks)) % len(batch_shares)
    return batch_shares[batches] * tokens * K


def dynamic_layer(
    rows: np.ndarray, rank_of_expert: Sequence[int], costs: LayerCosts, network: Network, cores: int | None = None
) -> LayerTime:
    """rows (R, E) that each rank sends. cores: how many of the ranks can compute at a time; None: all."""
    ranks, experts = rows.shape
    tokens = rows.sum() / K / ranks
    to_rank = np.zeros((ranks, ranks))
    np.add.at(to_rank.T, np.asarray(rank_of_expert), rows.T)
    bytes_sent = to_rank * costs.model_dim * costs.device.element
    at_experts = np.bincount(rank_of_expert, weights=costs.expert(rows.sum(axis=0)), minlength=ranks)
    exchange = network.exchange(bytes_sent) + network.exchange(bytes_sent.T)
    sizes = network.exchange(np.full((ranks, ranks), 8.0 * experts / ranks))
    waiting = _slowed(ranks, cores)
    return LayerTime(
        gate=costs.gate_seconds * tokens * waiting,
        move=costs.move_seconds * tokens * waiting,
        exchange=exchange + sizes,
        experts=max(at_experts.max(), at_experts.sum() / min(ranks, cores or ranks)),
        largest_share=float(to_rank.sum(axis=0).max() / to_rank.sum()),
    )


def static_layer(
    tokens: int, ranks: int, costs: LayerCosts, network: Network, shape: Shape, cores: int | None = None
) -> LayerTime:
    """Every rank sends C slots to every expert, whatever the routing; experts lie evenly."""
    slots = static_slots(tokens, shape.fraction)
    waiting = _slowed(ranks, cores)
    sent = np.full((ranks, ranks), shape.experts / ranks * slots * costs.model_dim * costs.device.element)
    at_rank = shape.experts / ranks * float(costs.expert(np.array(ranks * slots)))
    sizes = network.exchange(np.full((ranks, ranks), 8.0))
    return LayerTime(
        gate=(costs.gate_seconds * tokens + costs.mask(tokens, shape.experts, slots)) * waiting,
        move=0.0,
        exchange=2 * network.exchange(sent) + sizes,
        experts=at_rank * waiting,
        largest_share=1 / ranks,
    )


def _slowed(ranks: int, cores: int | None) -> float:
    """How much longer work takes that all ranks do at once."""
    return 1.0 if cores is None else max(1.0, ranks / cores)


def rest_of_step(tokens: int, costs: LayerCosts, shape: Shape, cross_attention: bool, predicts: bool) -> float:
    """Seconds of a step outside its MoE layers: projections of attention, dense feed-forwards, the vocabulary's.

    Each is a product with so many weights and takes its part of an expert's time on as many rows.
    """
    dense = float(costs.expert(np.array(tokens))) / (2 * shape.model_dim * shape.hidden_dim)  # seconds per weight
    attention = (4 + 2 * cross_attention) * shape.model_dim**2
    weights = shape.layers * attention + (shape.layers - shape.moe_layers) * 2 * shape.model_dim * shape.hidden_dim
    return dense * (weights + predicts * shape.vocabulary * shape.model_dim)


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
        fitted = [[at for (at,) in balanced(first, count, stack.kind)] for first, _ in halves]
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


def mean_time(layers: Sequence[LayerTime]) -> LayerTime:
    names = LayerTime.__dataclass_fields__
    return LayerTime(**{name: float(np.mean([getattr(layer, name) for layer in layers])) for name in names})
