"""The time of a step on R ranks, from recorded routing and measured costs; its assumptions: docs/scaling_model.md.

Legend: T = tokens of a rank, E = experts, K = choices per token, C = slots per expert, D = model dim, R = ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.balancing.load import shares
from reproduction.cluster import Network
from reproduction.layer_costs import K, LayerCosts, Shape, static_slots


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
