"""Capacity-aware inference: a limit to the assignments of an expert (or a rank), and what becomes of the overflow.

Paper: "Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts" (arXiv 2503.05066): token drop,
reroute (its first version) and expanded drop (the later one). The limit is counted on a rank's own tokens, before any
exchange. All of it is sorting and indexing: no loop over tokens or experts, nothing waits for the host.

Legend: T = tokens, K = choices per token, E = experts, R = ranks (real ones, or virtual ones on one process),
G = limited groups: an expert, or a rank's experts, as the tokens of one rank see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from fairseq_moe_ext.gating.routing import Routing, only_kept

OVERFLOWS = ("drop", "reroute", "expand")
DROP_METRICS = ("score", "order", "reverse-order", "random")
CAPACITY_SCOPES = ("expert", "rank")
FACTOR_DENOMINATOR = 10**6  # the capacity factor counts with six decimals
REROUTE_ROUNDS = 4  # what overflows after them is dropped


@dataclass(frozen=True)
class CapacityRules:
    """What the user chose.

    factor: gamma; an expert takes gamma times the mean load T * K / E. overflow: `drop` it; `reroute`: it chooses again
    among all experts, in rounds; `expand`: among the experts of the token's own rank, once. metric: who stays: the
    highest gate probability, the first tokens, the last, or at random. scope: the limit is an expert's, or the sum of a
    rank's experts. renormalize: a token's remaining weights are scaled to the sum that they had.
    """

    factor: float
    overflow: str = "drop"
    metric: str = "score"
    scope: str = "expert"
    renormalize: bool = False


@dataclass(frozen=True)
class Limited:
    """A routing under its capacity.

    routing: dropped assignments not kept, rerouted ones with their new experts. weights: (T, K), zero where not kept.
    rerouted: (T, K) bool, kept assignments on another expert than the gate chose. overflowing: scalar, the paper's
    numerator of the dropped fraction, the sum over experts of relu(load - gamma * mean load), for each rank's tokens.
    """

    routing: Routing
    weights: Tensor
    rerouted: Tensor
    overflowing: Tensor


class Capacity:
    """The rules for a layer whose experts lie as `ranks_of_experts` says: E rank numbers below `num_ranks`."""

    def __init__(self, rules: CapacityRules, ranks_of_experts: Sequence[int], num_ranks: int):
        self.rules = rules
        self.num_ranks = num_ranks
        self._ranks_of_experts = torch.tensor(ranks_of_experts)
        self._experts_per_rank = torch.bincount(self._ranks_of_experts, minlength=num_ranks)
        self._generator: torch.Generator | None = None
        self._seed = 0

    def seed(self, seed: int) -> None:
        """Of the metric `random`."""
        self._seed, self._generator = seed, None

    def apply(
        self, routing: Routing, weights: Tensor, ranks_of_tokens: Tensor, preferred: Tensor | None = None
    ) -> Limited:
        """Limit a gate's routing, whose combine weights are `weights` (T, K).

        ranks_of_tokens: (T,) int64. preferred: (E,) bool, experts that overflow goes to first, whatever their score.
        """
        device = weights.device
        if self._ranks_of_experts.device != device:
            self._ranks_of_experts = self._ranks_of_experts.to(device)
            self._experts_per_rank = self._experts_per_rank.to(device)
        batch = _Batch(self, routing, ranks_of_tokens)
        if self.rules.overflow == "reroute":
            expert_ids, kept = batch.reroute(preferred)
        elif self.rules.overflow == "expand":
            expert_ids, kept = batch.expand(preferred)
        else:
            expert_ids, kept = routing.expert_ids, batch.fits(routing.expert_ids, routing.kept)
        moved = expert_ids != routing.expert_ids
        limited = replace(routing, expert_ids=expert_ids, kept=kept)
        return Limited(limited, self._weigh(routing, limited, moved, weights), moved & kept, batch.overflowing())

    def _weigh(self, before: Routing, after: Routing, moved: Tensor, weights: Tensor) -> Tensor:
        """A new expert's weight is its probability in the scale of the token's own weights."""
        total = weights.float().sum(dim=1, keepdim=True)
        probability = only_kept(before.probabilities.gather(1, before.expert_ids), before.kept)
        probability = probability.float().sum(dim=1, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny
        new = after.probabilities.gather(1, after.expert_ids).float() * (total / probability.clamp_min(tiny))
        weights = only_kept(torch.where(moved, new.to(weights.dtype), weights), after.kept)
        if self.rules.renormalize:
            remaining = weights.float().sum(dim=1, keepdim=True)
            # a token that lost nothing keeps its weights to the last bit
            scale = torch.where(remaining == total, torch.ones_like(total), total / remaining.clamp_min(tiny))
            weights = only_kept(weights.float() * scale, after.kept).to(weights.dtype)
        return weights

    def random(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1), float32, of the shape and on the device of `like`; a seed repeats them."""
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        return torch.rand(like.shape, device=like.device, generator=self._generator)


class _Batch:
    """One batch's routing with its capacities."""

    def __init__(self, capacity: Capacity, routing: Routing, ranks_of_tokens: Tensor):
        self._capacity = capacity
        self._rules = capacity.rules
        self._routing = routing
        self._ranks_of_tokens = ranks_of_tokens.unsqueeze(1)  # (T, 1)
        num_tokens, num_choices = routing.expert_ids.shape
        self._random = capacity.random(routing.weights) if self._rules.metric == "random" else None
        counted = routing.kept.any(dim=1).long()  # padding does not count
        tokens = counted.new_zeros(capacity.num_ranks).scatter_add_(0, ranks_of_tokens, counted)  # (R,)
        # gamma times an expert's mean load, in whole numbers: a product of floats may fall short of one. No load is
        # over E times the mean
        factor = Fraction(repr(min(self._rules.factor, routing.num_experts))).limit_denominator(FACTOR_DENOMINATOR)
        self._of_expert, self._unit = tokens * num_choices * factor.numerator, factor.denominator * routing.num_experts
        if self._rules.scope == "rank":
            limit = self._of_expert.unsqueeze(1) * capacity._experts_per_rank  # (R, R)
            most = tokens * num_choices
        else:
            limit = self._of_expert.unsqueeze(1).expand(-1, routing.num_experts)  # (R, E)
            most = tokens
        self._limits = (limit // self._unit).clamp_min(1).minimum(most.unsqueeze(1)).reshape(-1)  # (G,)

    def fits(self, expert_ids: Tensor, wanted: Tensor, taken: Tensor | None = None) -> Tensor:
        """expert_ids, wanted (T, K) -> which of the wanted assignments find room beside `taken` (G,) others (T, K)."""
        groups = self._groups(expert_ids).masked_fill(~wanted, self._limits.numel()).view(-1)
        order = self._priority(expert_ids).reshape(-1).argsort(descending=True, stable=True)
        order = order[groups[order].argsort(stable=True)]
        load = self._load(groups, self._limits.numel() + 1)
        first = (load.cumsum(0) - load)[groups[order]]
        position = torch.empty_like(groups)  # of an assignment in its group's queue
        position[order] = torch.arange(groups.numel(), device=groups.device) - first
        room = self._limits if taken is None else self._limits - taken
        room = torch.cat((room, room.new_zeros(1)))
        return (position < room[groups]).view_as(wanted)

    def reroute(self, preferred: Tensor | None) -> tuple[Tensor, Tensor]:
        """Overflow chooses again among all experts that its token has not tried, and all compete anew."""
        expert_ids, wanted = self._routing.expert_ids, self._routing.kept
        tried = torch.zeros_like(self._routing.probabilities, dtype=torch.bool).scatter_(1, expert_ids, True)
        kept = self.fits(expert_ids, wanted)
        for _ in range(REROUTE_ROUNDS):
            expert_ids, _ = self._choose_again(expert_ids, wanted & ~kept, tried, preferred)
            tried = tried.scatter(1, expert_ids, True)
            kept = self.fits(expert_ids, wanted)
        return expert_ids, kept

    def expand(self, preferred: Tensor | None) -> tuple[Tensor, Tensor]:
        """Overflow chooses once among the experts of its token's own rank, where the gate's own choices left room."""
        expert_ids, wanted = self._routing.expert_ids, self._routing.kept
        kept = self.fits(expert_ids, wanted)
        foreign = self._capacity._ranks_of_experts.unsqueeze(0) != self._ranks_of_tokens  # (T, E)
        expert_ids, moved = self._choose_again(
            expert_ids, wanted & ~kept, foreign.scatter(1, expert_ids, True), preferred
        )
        taken = self._load(self._groups(expert_ids).masked_fill(~kept, self._limits.numel()).view(-1))
        return expert_ids, kept | self.fits(expert_ids, moved, taken)

    def overflowing(self) -> Tensor:
        groups = self._ranks_of_tokens * self._routing.num_experts + self._routing.expert_ids
        size = self._capacity.num_ranks * self._routing.num_experts
        load = self._load(groups.masked_fill(~self._routing.kept, size).view(-1), size)
        limits = self._of_expert.repeat_interleave(self._routing.num_experts)
        return (load * self._unit - limits).clamp_min(0).sum().double() / self._unit

    def _choose_again(
        self, expert_ids: Tensor, overflow: Tensor, barred: Tensor, preferred: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The best experts that are not barred (T, E) for a token's overflowing assignments -> ids, and which moved.

        Of equals the lowest number is the best, which topk would not promise.
        """
        scores = self._routing.probabilities.masked_fill(barred, -1.0)
        values, indices = [], []
        for _ in range(expert_ids.size(1)):
            value, index = scores.max(dim=1, keepdim=True)  # (T, 1)
            if preferred is not None:
                found = scores.masked_fill(~preferred, -1.0).max(dim=1, keepdim=True)
                index = torch.where(found.values >= 0, found.indices, index)
            scores = scores.scatter(1, index, -1.0)
            values.append(value)
            indices.append(index)
        number = (overflow.cumsum(dim=1) - 1).clamp_min(0)  # the first takes the best, the second the next
        moved = overflow & (torch.cat(values, dim=1).gather(1, number) >= 0)
        return torch.where(moved, torch.cat(indices, dim=1).gather(1, number), expert_ids), moved

    def _groups(self, expert_ids: Tensor) -> Tensor:
        """(T, K) int64 numbers of the groups that the assignments count for."""
        if self._rules.scope == "rank":
            return self._ranks_of_tokens * self._capacity.num_ranks + self._capacity._ranks_of_experts[expert_ids]
        return self._ranks_of_tokens * self._routing.num_experts + expert_ids

    def _load(self, groups: Tensor, size: int | None = None) -> Tensor:
        """Assignments in each of the first `size` groups (default: G), groups at most one past them -> (size,)."""
        size = self._limits.numel() if size is None else size
        return groups.new_zeros(size + 1).scatter_add_(0, groups, torch.ones_like(groups))[:size]

    def _priority(self, expert_ids: Tensor) -> Tensor:
        """(T, K), the larger the rather an assignment stays; equals stay in the order of tokens, then choices."""
        if self._rules.metric == "score":
            score = self._routing.probabilities.gather(1, expert_ids)
            return score.nan_to_num(nan=-1.0)  # what is no number leaves first
        if self._rules.metric == "random":
            return self._random
        token = torch.arange(expert_ids.size(0), device=expert_ids.device).unsqueeze(1).expand_as(expert_ids)
        return token if self._rules.metric == "reverse-order" else -token
