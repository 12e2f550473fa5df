"""The capacity as a rule of a layer (capacity-aware inference, capacity.py). Legend: B = sentences, T = tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fairseq_moe_ext.gating.call import Call
from fairseq_moe_ext.gating.capacity import Capacity
from fairseq_moe_ext.gating.routing import Routing

CAPACITY_PHASES = ("all", "prefill")


class Limit:
    """Limits the assignments of every expert, or rank; a Rule.

    phases: one of CAPACITY_PHASES; `prefill` leaves decode steps alone. prefer_resident: overflow goes to the experts
    first that are in a buffer. rank: whose tokens a process routes; None: its sentences are dealt out to virtual ranks.
    """

    def __init__(
        self, capacity: Capacity, phases: str = "all", prefer_resident: bool = False, rank: int | None = None
    ):
        self.capacity = capacity
        self._phases, self._prefer_resident, self._rank = phases, prefer_resident, rank

    def seed(self, seed: int) -> None:
        """Begin anew the numbers that the metric `random` draws."""
        self.capacity.seed(seed + 500_000)  # other numbers than the gate draws

    def __call__(self, routing: Routing, call: Call) -> Routing:
        """As `Rule` has it: weights are those of what the limit leaves."""
        if call.decoding and self._phases == "prefill":
            return routing
        weights = call.gate.combine_weights(routing)
        preferred = None
        if self._prefer_resident:
            preferred = torch.zeros(routing.num_experts, dtype=torch.bool)
            preferred[call.experts.resident_experts] = True
            preferred = preferred.to(weights.device)
        limited = self.capacity.apply(routing, weights, self._ranks_of_tokens(routing, call), preferred)
        call.overflowing = limited.overflowing
        call.clock.lap("capacity")
        return replace(limited.routing, weights=limited.weights, is_weighted=True)

    def _ranks_of_tokens(self, routing: Routing, call: Call) -> Tensor:
        """(T,) int64. Sentences are dealt out in order; those of padding alone count for none."""
        num_tokens, num_ranks = routing.expert_ids.size(0), self.capacity.num_ranks
        if self._rank is not None:
            return torch.full((num_tokens,), self._rank, device=routing.kept.device)
        num_sentences = call.num_sentences
        positions = num_tokens // max(num_sentences, 1)
        filled = routing.kept.any(dim=1).view(num_sentences, positions).any(dim=1).long()  # (B,)
        numbers = filled.cumsum(0) - filled
        ranks = (numbers * num_ranks // filled.sum().clamp_min(1)).clamp_max(num_ranks - 1)
        return ranks.unsqueeze(1).expand(num_sentences, positions).reshape(-1)
