"""Static gating as a dispatcher: every expert has as many slots, full or empty, and computes them all.

What finds no slot is dropped, in upstream's order. Dense: upstream's own mask products (static.py). Sparse: indices in
their place, with the same result (sparse_static.py).

Legend: B = sentences, L = positions, T = tokens, E = experts, K = choices per token, C = slots per expert, N = E * C
rows, D = model dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairseq_moe_ext.gating.call import Call
from fairseq_moe_ext.gating.dispatcher import Dispatcher, Local
from fairseq_moe_ext.gating.routing import Routing
from fairseq_moe_ext.gating.sparse_static import slot_rows, sparse_dispatch
from fairseq_moe_ext.gating.static import (
    assign_slots,
    dense_combine_weights,
    static_capacity,
    static_combine,
    static_dispatch,
)
from fairseq_moe_ext.kernels.combine import weighted_sum

GATINGS = ("dynamic", "static")


@dataclass(frozen=True)
class StaticOptions:
    """What only static gating needs, by upstream's fields.

    capacity_fraction: `moe_eval_capacity_token_fraction`; at or below 0 evaluation has training's capacity.
    batch_prioritized: `moe_batch_prioritized_routing`.
    count_padding: the inverse of `use_moe_pad_mask`; True routes padding like any token, and it takes slots.
    batch_size, batch_size_valid: rows to which a training or validation batch is padded; None pads nothing.
    max_positions: positions per row that count for the capacity (`moe_eval_capacity_max_seqlen`); None counts tokens.
    sparse: indices in place of the dense mask, with the same result (sparse_static.py).
    """

    capacity_fraction: float = 0.25
    batch_prioritized: bool = False
    count_padding: bool = True
    batch_size: int | None = None
    batch_size_valid: int | None = None
    max_positions: int | None = None
    sparse: bool = False


def dispatcher_for(gating: str, static: StaticOptions = StaticOptions()) -> Dispatcher:
    """What `--moe-gating` names, on one process; ValueError for another name."""
    if gating not in GATINGS:
        raise ValueError(f"gating must be one of {', '.join(GATINGS)}, got {gating!r}")
    if gating == "dynamic":
        return Local()
    return SparseSlots(static) if static.sparse else DenseSlots(static)


@dataclass(frozen=True)
class SlotsPlan:
    """routing: without what found no slot. capacity: C. weights: (T, K) of the outputs' sum, zero where not kept.

    way: dense: the combine weights (T, E, C); sparse: the rows (T, K) of the assignments, -1 where not kept.
    """

    routing: Routing
    capacity: int
    weights: Tensor
    way: Tensor

    @cached_property
    def load(self) -> Sequence[int]:
        """As `Planned` has it."""
        routing = self.routing
        return torch.bincount(routing.expert_ids[routing.kept], minlength=routing.num_experts).tolist()


class Slots(ABC):
    """What dense and sparse share."""

    gating = "static"
    spans_ranks = False

    def __init__(self, options: StaticOptions = StaticOptions()):
        self.options = options

    @property
    def counts_padding(self) -> bool:
        """Whether padding takes slots, as upstream has it without `use_moe_pad_mask`."""
        return self.options.count_padding

    def whole_call(self) -> AbstractContextManager:
        """As `Dispatcher` has it: nothing."""
        return nullcontext()

    def batch(self, x: Tensor, mask: Tensor | None, training: bool, serving: bool) -> tuple[Tensor, Tensor | None]:
        """Training and validation batches are padded to the batch size with masked zero rows, as upstream pads them."""
        if self.counts_padding:
            mask = None
        expected = self.options.batch_size if training else self.options.batch_size_valid
        missing = 0 if serving or not expected else expected - x.size(0)
        if missing == 0:
            return x, mask
        if missing < 0:
            raise ValueError(
                f"batch-size must be at least the rows of every batch under static gating: {expected} < {x.size(0)}"
            )
        if mask is None:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        mask = torch.cat((mask, mask.new_ones(missing, x.size(1))))
        return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))), mask

    def plan(self, routing: Routing, call: Call) -> SlotsPlan:
        """As `Dispatcher` has it: the capacity, and slots in upstream's order."""
        capacity = self.capacity(routing, call)
        call.experts.prefetch([capacity] * routing.num_experts)  # copies go on while slots are assigned
        return self.assigned(routing, capacity, call)

    def capacity(self, routing: Routing, call: Call) -> int:
        """C of this call."""
        options, (counted, num_choices) = self.options, routing.expert_ids.shape
        if options.max_positions is not None and options.capacity_fraction > 0 and not call.training:
            counted = call.num_sentences * options.max_positions
        return static_capacity(counted, routing.num_experts, num_choices, options.capacity_fraction, call.training)

    def assigned(self, routing: Routing, capacity: int, call: Call) -> SlotsPlan:
        """The plan under a capacity, without what finds no slot."""
        slots = assign_slots(routing, self.options.batch_prioritized and routing.expert_ids.size(1) > 1)
        routing = routing.keep_only(slots < capacity)
        call.clock.lap("capacity")
        weights = call.gate.combine_weights(routing)
        return SlotsPlan(routing, capacity, weights, self._way(routing, slots, weights, capacity, call))

    def run(self, planned: SlotsPlan, call: Call) -> Tensor:
        """As `Dispatcher` has it: E * C outputs, empty slots included."""
        rows = self.rows(planned, call)
        call.clock.lap("dispatch")
        outputs = call.experts(rows, [planned.capacity] * planned.routing.num_experts)
        call.clock.lap("experts")
        return outputs

    def rows(self, planned: SlotsPlan, call: Call) -> Tensor:
        """(E * C, D): every expert's slots, empty ones zero."""
        tokens = call.tokens
        if call.padding_mask is not None:  # a NaN there would be carried to all slots by the dense mask's product
            tokens = tokens.masked_fill(call.padding_mask.unsqueeze(1), 0)
        return self._fill(tokens, planned)

    @abstractmethod
    def _way(self, routing: Routing, slots: Tensor, weights: Tensor, capacity: int, call: Call) -> Tensor:
        """SlotsPlan.way."""

    @abstractmethod
    def _fill(self, tokens: Tensor, planned: SlotsPlan) -> Tensor:
        """tokens (T, D) -> every expert's slots (E * C, D), empty ones zero."""

    @abstractmethod
    def combine(self, outputs: Tensor, planned: SlotsPlan, call: Call) -> Tensor:
        """outputs (E * C, D) -> their weighted sum per token (T, D)."""


class DenseSlots(Slots):
    """By upstream's dense mask."""

    def _way(self, routing: Routing, slots: Tensor, weights: Tensor, capacity: int, call: Call) -> Tensor:
        return dense_combine_weights(routing, slots, weights, capacity).to(call.tokens.dtype)

    def _fill(self, tokens: Tensor, planned: SlotsPlan) -> Tensor:
        return static_dispatch(tokens, planned.way)

    def combine(self, outputs: Tensor, planned: SlotsPlan, call: Call) -> Tensor:
        """As `Dispatcher` has it, by the mask."""
        return static_combine(outputs, planned.way)


class SparseSlots(Slots):
    """By indices."""

    def _way(self, routing: Routing, slots: Tensor, weights: Tensor, capacity: int, call: Call) -> Tensor:
        return slot_rows(routing, slots, capacity)

    def _fill(self, tokens: Tensor, planned: SlotsPlan) -> Tensor:
        return sparse_dispatch(tokens, planned.routing, planned.way, planned.capacity)

    def combine(self, outputs: Tensor, planned: SlotsPlan, call: Call) -> Tensor:
        """As `Dispatcher` has it, by indices."""
        return weighted_sum(outputs, planned.way, planned.weights)
