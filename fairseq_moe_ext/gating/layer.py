"""One Mixture-of-Experts layer: gate, capacity, dispatch, experts, combine.

Legend: B = sentences, L = positions, T = tokens (B * L), E = experts, K = choices per token, D = model dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fairseq_moe_ext.experts.device_experts import choose_kernel, plan_grouped, run_grouped
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating.autocast import autocast_dtype, no_autocast
from fairseq_moe_ext.gating.capacity import Capacity, Limited
from fairseq_moe_ext.gating.device_counts import DeviceCounts
from fairseq_moe_ext.gating.dispatch import combine, dispatch, plan_dispatch
from fairseq_moe_ext.gating.routing import Gate, Routing
from fairseq_moe_ext.gating.sparse_static import slot_rows, sparse_combine, sparse_dispatch
from fairseq_moe_ext.gating.static import (
    assign_slots,
    dense_combine_weights,
    static_capacity,
    static_combine,
    static_dispatch,
)
from fairseq_moe_ext.gating.statistics import CallStatistics
from fairseq_moe_ext.kernels.forks import compute_alone_after_forks
from fairseq_moe_ext.ranks.exchange import LayerExchange, RoundFigures

GATINGS = ("dynamic", "static")
CAPACITY_PHASES = ("all", "prefill")


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


@dataclass
class LayerCall:
    """What one call of a layer did, for the report and the trace.

    dropped: assignments that found no slot; load: E tokens per expert that ran, which may lie on the device until they
    are read; seconds: time per part on the host; bytes_exchanged: of rows sent to other ranks (as many come back).
    Under capacity-aware inference rerouted: assignments that run on another expert than the gate chose; load_before: E
    tokens per expert as the gate chose; overflowing: the numerator of the paper's dropped fraction.
    """

    dropped: int
    load: Sequence[int]
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_exchanged: int = 0
    rerouted: int = 0
    load_before: Sequence[int] = field(default_factory=list)
    overflowing: float = 0.0

    @property
    def assignments(self) -> int:
        """Routed by the gate."""
        return sum(self.load) + self.dropped


class MOELayer(nn.Module):
    """The experts' feed-forward in a transformer layer; drop-in for the dense one, without residual or norm.

    gate: chooses experts. experts: rows in expert order and their counts -> outputs.
    gating: `dynamic` (no capacity, no placeholders) or `static` (upstream's dense mask).
    output_masking: upstream's `moe_eom`; in training that share of the experts' output rows is zeroed, in evaluation
    all are multiplied by one minus it.
    """

    def __init__(
        self,
        gate: Gate,
        experts: nn.Module,
        gating: str = "dynamic",
        static: StaticOptions = StaticOptions(),
        output_masking: float = 0.0,
    ):
        super().__init__()
        if gating not in GATINGS:
            raise ValueError(f"gating must be one of {', '.join(GATINGS)}, got {gating!r}")
        if not 0.0 <= output_masking < 1.0:
            raise ValueError(f"output_masking (moe_eom) must be in [0, 1), got {output_masking}")
        self.gate = gate
        self.experts = experts
        self.gating = gating
        self.static = static
        self.output_masking = output_masking
        self.serving = False
        self.observer: Callable[[LayerCall], None] | None = None
        self.exchange: LayerExchange | None = None  # under several ranks, where `experts` are those held here
        self.capacity: Capacity | None = None  # of capacity-aware inference
        self.capacity_phases = "all"
        self.prefer_resident = False  # overflow goes to the experts first that are in a buffer
        self.decoding = False  # whether this call is a decode step
        self.statistics: CallStatistics | None = None  # of the last call in training and validation

    def prepare_for_serving(
        self, seed: int, observer: Callable[[LayerCall], None] | None = None, validates: bool = False
    ) -> None:
        """From here on batches are served: no rows are padded, no statistics for a loss are kept.

        seed: of the random second-expert policies. observer: called with every call's LayerCall. validates: rows are
        padded and statistics kept, as between a training's epochs.
        """
        self.serving = not validates
        compute_alone_after_forks()
        self.seed(seed)
        self.observer = observer
        self.statistics = None

    def seed(self, seed: int) -> None:
        """Begin the streams that the random policies of the gate and of the capacity draw from."""
        self.gate.seed(seed)
        if self.capacity is not None:
            self.capacity.seed(seed + 500_000)  # other numbers than the gate draws

    def gate_loss(self) -> Tensor:
        """The load-balancing loss of the last call (training and validation only), a scalar."""
        loss = self._statistics().gate_loss()
        if self.training and torch.is_grad_enabled() and self.gate.wg.weight.requires_grad > loss.requires_grad:
            loss = loss.detach().requires_grad_()
            loss.register_hook(_refuse_gradient)
        return loss

    def metadata(self) -> dict[str, Tensor]:
        """Upstream's metadata of the last call (training and validation only)."""
        return self._statistics().metadata()

    def _statistics(self) -> CallStatistics:
        if self.statistics is None:
            raise RuntimeError("a gate loss needs a call of the layer before it, and a layer that is not serving")
        return self.statistics

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), padding_mask (B, L) bool with True on padding -> (B, L, D).

        Padding comes out as zero, except under static gating that counts it. Under several ranks an error on any of
        them is one on all (ExchangeError on the others), and ends the exchange. Under `torch.autocast` the result has
        its dtype, as a dense layer's.
        """
        with nullcontext() if self.exchange is None else self.exchange.whole_rounds():
            dtype = autocast_dtype(x)
            if dtype is None or (self.exchange is None and isinstance(self.experts, ResidentExperts)):
                return self._forward(x, padding_mask)
            with no_autocast(x):  # tokens travel, and a buffer computes, in the experts' own dtype
                return self._forward(x.to(self.experts.dtype), padding_mask).to(dtype)

    def _forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        if self.gating == "dynamic":
            tokens = x.reshape(-1, x.size(2))
            result = self._dynamic(tokens, None if padding_mask is None else padding_mask.reshape(-1), x.size(0))
            return result.view_as(x)
        if self.static.count_padding:
            padding_mask = None
        rows = x.size(0)
        x, padding_mask = self._pad_rows(x, padding_mask)
        tokens = x.reshape(-1, x.size(2))
        counted = tokens.size(0)
        if self.static.max_positions is not None and self.static.capacity_fraction > 0 and not self.training:
            counted = x.size(0) * self.static.max_positions
        result = self._static(tokens, None if padding_mask is None else padding_mask.reshape(-1), counted)
        return result.view_as(x)[:rows]

    def _dynamic(self, tokens: Tensor, padding_mask: Tensor | None, num_sentences: int) -> Tensor:
        """tokens (T, D) of so many sentences, padding_mask (T,) -> (T, D); every kept assignment runs."""
        clock = _Clock(self.observer is not None)
        routing = self.gate(tokens, padding_mask)
        tokens = tokens.to(autocast_dtype(tokens) or tokens.dtype)
        weights = self.gate.combine_weights(routing, tokens.dtype)
        clock.lap("gate")
        wanted, limited = routing, None
        if self.capacity is not None and not (self.decoding and self.capacity_phases == "prefill"):
            limited = self._limit(routing, weights, num_sentences)
            routing, weights = limited.routing, limited.weights
            clock.lap("capacity")
        kernel = choose_kernel(self.experts, tokens, weights) if self.exchange is None else "loop"
        if kernel != "loop":
            plan = plan_grouped(routing)
            load = DeviceCounts(plan.tokens_per_expert)
            clock.lap("dispatch")
            result = run_grouped(kernel, self.experts, tokens, plan, weights, scale=1.0 - self.output_masking)
            clock.lap("experts")
        elif self.exchange is None:
            plan = plan_dispatch(routing)
            load = plan.tokens_per_expert
            self.experts.announce(load)
            rows = dispatch(tokens, plan)
            clock.lap("dispatch")
            outputs = self.experts(rows, load)
            clock.lap("experts")
        else:
            plan = plan_dispatch(routing, self.exchange.copies, send_sizes=self.exchange.begin)
            load = self.exchange.copies.fold(plan.tokens_per_expert)
            rows = dispatch(tokens, plan)
            clock.lap("dispatch")
            outputs, figures = self.exchange.run(rows, plan.tokens_per_expert)
            clock.took(figures)
        if kernel == "loop":
            result = combine(self._mask_outputs(outputs), plan, weights)
            clock.lap("combine")
        self._record(wanted, routing)
        if self.observer is not None:
            call = LayerCall(0, load, clock.seconds, clock.bytes_exchanged)
            if self.capacity is not None:
                call.load_before = load
            if limited is not None:
                call.load_before = torch.bincount(
                    wanted.expert_ids[wanted.kept], minlength=wanted.num_experts
                ).tolist()
                call.dropped = sum(call.load_before) - sum(load)
                call.rerouted, call.overflowing = int(limited.rerouted.sum()), float(limited.overflowing)
            self.observer(call)
        return result

    def _limit(self, routing: Routing, weights: Tensor, num_sentences: int) -> Limited:
        """The routing of so many sentences under the capacity, which counts a rank's own tokens.

        On one process the sentences are dealt out to the virtual ranks in order; those of padding alone count for none.
        """
        num_tokens, num_ranks = routing.expert_ids.size(0), self.capacity.num_ranks
        if self.exchange is None:
            positions = num_tokens // max(num_sentences, 1)
            filled = routing.kept.any(dim=1).view(num_sentences, positions).any(dim=1).long()  # (B,)
            numbers = filled.cumsum(0) - filled
            ranks = (numbers * num_ranks // filled.sum().clamp_min(1)).clamp_max(num_ranks - 1)
            ranks = ranks.unsqueeze(1).expand(num_sentences, positions).reshape(-1)
        else:
            ranks = torch.full((num_tokens,), self.exchange.rank, device=weights.device)
        preferred = None
        if self.prefer_resident:
            preferred = torch.zeros(routing.num_experts, dtype=torch.bool)
            preferred[self.experts.resident_experts] = True
            preferred = preferred.to(weights.device)
        return self.capacity.apply(routing, weights, ranks, preferred)

    def _static(self, tokens: Tensor, padding_mask: Tensor | None, counted: int) -> Tensor:
        """tokens (T, D), padding_mask (T,) -> (T, D); `counted` tokens set the capacity."""
        clock = _Clock(self.observer is not None)
        wanted = self.gate(tokens, padding_mask)
        tokens = tokens.to(autocast_dtype(tokens) or tokens.dtype)
        clock.lap("gate")
        num_choices = wanted.expert_ids.size(1)
        capacity = static_capacity(
            counted, wanted.num_experts, num_choices, self.static.capacity_fraction, self.training
        )
        counts = [capacity] * wanted.num_experts
        if self.exchange is None:
            self.experts.announce(counts)
        slots = assign_slots(wanted, self.static.batch_prioritized and num_choices > 1)
        routing = wanted.keep_only(slots < capacity)
        clock.lap("capacity")
        weights = self.gate.combine_weights(routing, routing.weights.dtype)
        if padding_mask is not None:  # whatever stands there: the dense mask's product would carry a NaN to all slots
            tokens = tokens.masked_fill(padding_mask.unsqueeze(1), 0)
        if self.static.sparse:
            places = slot_rows(routing, slots, capacity)  # (T, K)
            rows = sparse_dispatch(tokens, routing, places, capacity)  # (E * C, D)
        else:
            dense = dense_combine_weights(routing, slots, weights, capacity).to(tokens.dtype)  # (T, E, C)
            rows = static_dispatch(tokens, dense)  # (E * C, D)
        clock.lap("dispatch")
        if self.exchange is None:
            outputs = self.experts(rows, counts)
            clock.lap("experts")
        else:
            outputs, figures = self.exchange.run_static(rows.view(wanted.num_experts, capacity, rows.size(1)))
            outputs = outputs.view_as(rows)
            clock.took(figures)
        outputs = self._mask_outputs(outputs)
        if self.static.sparse:
            result = sparse_combine(outputs, places, weights.to(tokens.dtype))
        else:
            result = static_combine(outputs, dense)
        clock.lap("combine")
        self._record(wanted, routing)
        if self.observer is not None:
            load = torch.bincount(routing.expert_ids[routing.kept], minlength=wanted.num_experts).tolist()
            dropped = int(wanted.kept.sum()) - sum(load)
            self.observer(LayerCall(dropped, load, clock.seconds, clock.bytes_exchanged))
        return result

    def _mask_outputs(self, outputs: Tensor) -> Tensor:
        if self.output_masking == 0.0:
            return outputs
        if self.training:
            survives = torch.rand(outputs.size(0), 1, device=outputs.device) > self.output_masking
            return outputs * survives
        return outputs * (1 - self.output_masking)

    def _pad_rows(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Training and validation batches padded to the batch size with masked zero rows, as upstream pads them."""
        expected = self.static.batch_size if self.training else self.static.batch_size_valid
        missing = 0 if self.serving or not expected else expected - x.size(0)
        if missing == 0:
            return x, padding_mask
        if missing < 0:
            raise ValueError(
                f"batch-size must be at least the rows of every batch under static gating: {expected} < {x.size(0)}"
            )
        if padding_mask is None:
            padding_mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding_mask = torch.cat((padding_mask, padding_mask.new_ones(missing, x.size(1))))
        return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))), padding_mask

    def _record(self, before: Routing, after: Routing) -> None:
        if not self.serving:
            self.statistics = CallStatistics(before, after)


def _refuse_gradient(_gradient: Tensor) -> None:
    raise RuntimeError(
        "the gate loss has no gradient, since the layer's last call ran without one: of activation checkpoints "
        "--checkpoint-activations alone keeps it"
    )


class _Clock:
    """Host seconds between laps; takes none when off."""

    def __init__(self, on: bool):
        self.seconds: dict[str, float] = {}
        self.bytes_exchanged = 0
        self._on = on
        self._last = time.perf_counter() if on else 0.0

    def lap(self, part: str) -> None:
        if self._on:
            now = time.perf_counter()
            self.seconds[part] = now - self._last
            self._last = now

    def took(self, figures: RoundFigures) -> None:
        """A round with the other ranks ends now, which knows its own figures."""
        self.lap("exchange")
        self.seconds.update(figures.seconds)
        self.bytes_exchanged = figures.bytes_exchanged
