"""What the parts of a MoE layer cost on one thread of this machine, measured; and the same carried over to another.

Legend: T = tokens, E = experts, K = choices per token, C = slots per expert, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import Top2Gate
from fairseq_moe_ext.gating.plan import plan_by_expert
from fairseq_moe_ext.gating.static import assign_slots, dense_combine_weights, static_combine, static_dispatch
from fairseq_moe_ext.kernels.combine import weighted_sum
from reproduction.cluster import Device

ROWS = (1, 4, 16, 64, 256)
OUT_OF_CACHE = 1 << 27  # bytes of experts computed in turn, so that weights come from memory, as among hundreds
CARRIED_ROWS = tuple(4**power for power in range(9))
TOKENS = 256
MASK_EXPERTS, MASK_SLOTS = 32, 16
K = 2


@dataclass(frozen=True)
class Shape:
    """A model's MoE layers and what is around them; layers: all, moe_layers of them; fraction: static gating's."""

    experts: int
    model_dim: int
    hidden_dim: int
    layers: int
    moe_layers: int
    vocabulary: int
    fraction: float


@dataclass(frozen=True)
class LayerCosts:
    """Seconds on `device`. expert_seconds: of one expert on `rows` rows; gate and move per token, both ways; mask per
    entry of a mask (T, E, C): made, and multiplied with D columns, both ways.
    """

    device: Device
    model_dim: int
    hidden_dim: int
    rows: tuple[int, ...]
    expert_seconds: tuple[float, ...]
    gate_seconds: float
    move_seconds: float
    mask_seconds: float
    product_seconds: float

    def expert(self, rows: np.ndarray) -> np.ndarray:
        """Seconds of one expert each on `rows` rows, of any shape.

        Between the measured points by straight lines, beyond them by the last one; less than one row is one row so
        many times out of one.
        """
        slope = (self.expert_seconds[-1] - self.expert_seconds[-2]) / (self.rows[-1] - self.rows[-2])
        within = np.interp(rows, (0, *self.rows), (0.0, *self.expert_seconds))
        return within + np.maximum(rows - self.rows[-1], 0) * slope

    def mask(self, tokens: int, experts: int, slots: int) -> float:
        """Of static gating's mask and of both products with it."""
        return tokens * experts * slots * (self.mask_seconds + self.product_seconds)

    def fastest(self, other: LayerCosts) -> LayerCosts:
        """Of two measurements of the same."""
        names = ("gate_seconds", "move_seconds", "mask_seconds", "product_seconds")
        return replace(
            self, expert_seconds=tuple(map(min, self.expert_seconds, other.expert_seconds)),
            **{name: min(getattr(self, name), getattr(other, name)) for name in names},
        )

    def on(self, device: Device) -> LayerCosts:
        """Carried over to another device: as much of its bandwidth and arithmetic as was reached on this one.

        An expert takes the longer of one read of its weights, at the share of the bandwidth that one row reached here,
        and its arithmetic, at the share of the peak that the most rows reached; the rest follows bandwidth or
        arithmetic alone (docs/scaling_model.md).
        """
        if device == self.device:
            return self
        bytes_ = self.device.memory / device.memory * device.element / self.device.element
        reading = self.expert_seconds[0] * bytes_
        computing = self.expert_seconds[-1] / self.rows[-1] * self.device.flops / device.flops
        seconds = tuple(max(reading, rows * computing) for rows in CARRIED_ROWS)
        return LayerCosts(
            device, self.model_dim, self.hidden_dim, CARRIED_ROWS, seconds, self.gate_seconds * bytes_,
            self.move_seconds * bytes_, self.mask_seconds * bytes_,
            self.product_seconds * self.device.flops / device.flops,
        )


def measure_device(seconds: float = 0.5) -> Device:
    """One thread of this machine: its fastest product of matrices, and its fastest read."""
    a, b, long = torch.randn(512, 1024), torch.randn(1024, 1024), torch.ones(1 << 26)
    flops = 2 * 512 * 1024 * 1024 / _fastest(lambda: a @ b, seconds)
    memory = long.numel() * 4 / _fastest(lambda: long.sum(), seconds)
    return Device("one thread of this machine", flops, memory, element=4)


@torch.inference_mode()
def measure_costs(device: Device, shape: Shape, seconds: float = 0.5) -> LayerCosts:
    """Of a layer of such dims, on random weights; the fastest of the calls of about so many seconds each."""
    dim = shape.model_dim
    at_hand = min(shape.experts, max(2, OUT_OF_CACHE // (2 * dim * shape.hidden_dim * device.element)))
    experts = ResidentExperts(at_hand, dim, shape.hidden_dim, initialize=False).eval()
    for weights in experts.parameters():
        weights.fill_(0.01)
    timed = []
    for rows in ROWS:
        x = torch.randn(rows * at_hand, dim)
        timed.append(_fastest(lambda x=x, rows=rows: experts(x, [rows] * at_hand), seconds) / at_hand)
    gate = Top2Gate(dim, shape.experts, use_fp32=True, second_expert_policy="all").eval()
    tokens = torch.randn(TOKENS, dim)
    routing = gate(tokens)
    weights = gate.combine_weights(routing).to(tokens.dtype)

    def move() -> None:
        plan = plan_by_expert(routing, weights)
        weighted_sum(tokens.index_select(0, plan.token_ids), plan.row_ids, plan.weights)

    few = Top2Gate(dim, MASK_EXPERTS, second_expert_policy="all").eval()(tokens)
    slots = assign_slots(few)
    kept = few.keep_only(slots < MASK_SLOTS)
    of_kept = gate.combine_weights(kept).to(tokens.dtype)
    dense = dense_combine_weights(kept, slots, of_kept, MASK_SLOTS)
    entries = TOKENS * MASK_EXPERTS * MASK_SLOTS
    return LayerCosts(
        device, dim, shape.hidden_dim, ROWS, tuple(timed),
        gate_seconds=_fastest(lambda: gate(tokens), seconds) / TOKENS,
        move_seconds=_fastest(move, seconds) / TOKENS,
        mask_seconds=_fastest(lambda: dense_combine_weights(kept, slots, of_kept, MASK_SLOTS), seconds) / entries,
        product_seconds=_fastest(lambda: static_combine(static_dispatch(tokens, dense), dense), seconds) / entries,
    )


def static_slots(tokens: int, fraction: float) -> int:
    """C of static gating in evaluation."""
    return math.ceil(fraction * tokens)


def _calls(call: Callable[[], object], seconds: float) -> list[float]:
    call()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds; whatever else runs on the machine only adds to them."""
    return min(_calls(call, seconds))
