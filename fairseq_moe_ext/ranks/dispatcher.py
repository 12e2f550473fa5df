"""Tokens to experts on other ranks and back, as dispatchers of a layer.

Legend: T = tokens, K = choices per token, E = experts, P = replicas of experts over all ranks, C = slots per expert,
N = rows, D = model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_ext.gating.call import Call
from fairseq_moe_ext.gating.dispatcher import Dispatcher
from fairseq_moe_ext.gating.plan import Plan, plan_by_expert
from fairseq_moe_ext.gating.routing import Routing
from fairseq_moe_ext.gating.slots import Slots, SlotsPlan
from fairseq_moe_ext.kernels.combine import weighted_sum
from fairseq_moe_ext.ranks.exchange import LayerExchange
from fairseq_moe_ext.ranks.round import RoundFigures


def over_ranks(dispatcher: Dispatcher, exchange: LayerExchange) -> Dispatcher:
    """What does over all ranks what `dispatcher` does on one process."""
    return RankSlots(dispatcher, exchange) if isinstance(dispatcher, Slots) else Ranks(exchange)


@dataclass(frozen=True)
class RanksPlan:
    """by_replica: the assignments in the order of replicas. counts: P rows per replica. load: E, of this rank."""

    by_replica: Plan
    counts: list[int]
    load: Sequence[int]

    @property
    def routing(self) -> Routing:
        """As `Planned` has it."""
        return self.by_replica.routing


class Ranks:
    """Dynamic gating: the sizes travel first, then exactly the tokens."""

    gating = "dynamic"
    counts_padding = False
    spans_ranks = True

    def __init__(self, exchange: LayerExchange):
        self.exchange = exchange

    def whole_call(self) -> AbstractContextManager:
        """As `Dispatcher` has it: an error in it is told to the other ranks."""
        return self.exchange.whole_rounds()

    def batch(self, x: Tensor, mask: Tensor | None, training: bool, serving: bool) -> tuple[Tensor, Tensor | None]:
        """As `Dispatcher` has it: unchanged."""
        return x, mask

    def plan(self, routing: Routing, call: Call) -> RanksPlan:
        """As `Dispatcher` has it: sorted by replica; the sizes leave before the rows are sorted."""
        replicas = self.exchange.replicas
        chosen = replicas.choose(routing.expert_ids, routing.kept)
        kept = chosen.masked_fill(~routing.kept, replicas.num_replicas).view(-1)
        sizes = torch.bincount(kept, minlength=replicas.num_replicas + 1)[: replicas.num_replicas]
        self.exchange.begin(sizes)  # they travel while the rows are sorted
        plan = plan_by_expert(routing, call.gate.combine_weights(routing), chosen, replicas.num_replicas)
        counts = sizes.tolist()
        return RanksPlan(plan, counts, replicas.fold(counts))

    def run(self, planned: RanksPlan, call: Call) -> Tensor:
        """As `Dispatcher` has it: tokens go to the experts' ranks and come back."""
        token_ids = planned.by_replica.token_ids[: sum(planned.counts)]
        rows = call.tokens.index_select(0, token_ids).to(call.experts.dtype)
        call.clock.lap("dispatch")
        outputs, figures = self.exchange.run(rows, planned.counts)
        _took(call, figures)
        return outputs

    def combine(self, outputs: Tensor, planned: RanksPlan, call: Call) -> Tensor:
        """As `Dispatcher` has it."""
        return weighted_sum(outputs, planned.by_replica.row_ids, planned.by_replica.weights)


class RankSlots:
    """Static gating: the padded slots of every expert travel, as upstream has it; `slots` is what one process does."""

    gating = "static"
    spans_ranks = True

    def __init__(self, slots: Slots, exchange: LayerExchange):
        self.slots, self.exchange = slots, exchange

    @property
    def counts_padding(self) -> bool:
        """Whether padding takes slots."""
        return self.slots.counts_padding

    def whole_call(self) -> AbstractContextManager:
        """As `Dispatcher` has it: an error in it is told to the other ranks."""
        return self.exchange.whole_rounds()

    def batch(self, x: Tensor, mask: Tensor | None, training: bool, serving: bool) -> tuple[Tensor, Tensor | None]:
        """As `Dispatcher` has it, as on one process."""
        return self.slots.batch(x, mask, training, serving)

    def plan(self, routing: Routing, call: Call) -> SlotsPlan:
        """As `Dispatcher` has it: the capacity is this rank's own."""
        return self.slots.assigned(routing, self.slots.capacity(routing, call), call)  # the exchange tells the experts

    def run(self, planned: SlotsPlan, call: Call) -> Tensor:
        """As `Dispatcher` has it: all slots, full or empty, go to the experts' ranks and come back."""
        rows = self.slots.rows(planned, call)
        call.clock.lap("dispatch")
        slots = rows.view(planned.routing.num_experts, planned.capacity, rows.size(1)).to(call.experts.dtype)
        outputs, figures = self.exchange.run_static(slots)
        _took(call, figures)
        return outputs.view_as(rows).to(rows.dtype)

    def combine(self, outputs: Tensor, planned: SlotsPlan, call: Call) -> Tensor:
        """As `Dispatcher` has it."""
        return self.slots.combine(outputs, planned, call)


def _took(call: Call, figures: RoundFigures) -> None:
    """A round with the other ranks ends now, which knows its own figures."""
    call.clock.lap("exchange")
    call.clock.correct(figures.seconds)
    call.bytes_exchanged = figures.bytes_exchanged
