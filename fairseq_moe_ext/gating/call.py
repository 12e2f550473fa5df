"""One call of a layer: what its parts know of it, and what the report and the trace are told.

Legend: B = sentences, L = positions, T = tokens, E = experts, K = choices per token, D = model dim.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fairseq_moe_ext.gating.routing import Gate, Routing
from fairseq_moe_ext.kernels.offsets import Offsets


class Experts(Protocol):
    """What a layer needs of its experts (experts/resident.py, buffering/cache.py), of which H lie here."""

    num_experts: int
    model_dim: int
    local: Sequence[int]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the experts' weights."""

    @property
    def device(self) -> torch.device:
        """Where rows must lie."""

    @property
    def resident_experts(self) -> list[int]:
        """The numbers of those in fast memory."""

    def input_dtype(self, tokens: Tensor) -> torch.dtype:
        """In which `tokens` must come."""

    def prefetch(self, rows_per_expert: Sequence[int]) -> None:
        """The H counts of the next call, as soon as they are known."""

    def run(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None = None) -> Tensor:
        """rows (N, D) in the order of the H experts, or those of rows (T, D) with the numbers row_ids (N,) int64 ->
        outputs (N, D)."""

    def __call__(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """The same by H counts on the host."""


class Clock:
    """Host seconds between laps, by the part that ends; takes none when off."""

    def __init__(self, on: bool):
        self.seconds: dict[str, float] = {}
        self._on = on
        self._last = time.perf_counter() if on else 0.0

    def lap(self, part: str) -> None:
        """The seconds since the last lap were spent on `part`."""
        if self._on:
            now = time.perf_counter()
            self.seconds[part] = now - self._last
            self._last = now

    def correct(self, seconds: Mapping[str, float]) -> None:
        """Of these parts somebody has closer figures."""
        if self._on:
            self.seconds.update(seconds)


@dataclass
class Call:
    """One call under way.

    tokens: (T, D) in the dtype that the experts want. padding_mask: (T,) bool with True on padding, or None.
    num_sentences: B. training, decoding: whether the layer trains; whether this is a decode step. overflowing,
    first_shares: what rules found, for LayerCall. bytes_exchanged: of rows sent to other ranks (as many come back).
    """

    tokens: Tensor
    padding_mask: Tensor | None
    num_sentences: int
    training: bool
    decoding: bool
    gate: Gate
    experts: Experts
    clock: Clock
    overflowing: Tensor | None = None
    first_shares: Tensor | None = None
    bytes_exchanged: int = 0


@dataclass
class LayerCall:
    """What one call of a layer did, for the report and the trace.

    dropped: assignments that found no slot; load: E tokens per expert that ran, which may lie on the device until they
    are read; seconds: time per part on the host; bytes_exchanged: of rows sent to other ranks (as many come back).
    Where rules may change the routing rerouted: assignments that run on another expert than the gate chose;
    load_before: E tokens per expert as the gate chose; overflowing: the numerator of the paper's dropped fraction;
    first_shares: tokens by their first choice's share (second_choice.py).
    """

    dropped: int
    load: Sequence[int]
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_exchanged: int = 0
    rerouted: int = 0
    load_before: Sequence[int] = field(default_factory=list)
    overflowing: float = 0.0
    first_shares: Sequence[int] = field(default_factory=list)

    @property
    def assignments(self) -> int:
        """Routed by the gate."""
        return sum(self.load) + self.dropped


def told(call: Call, wanted: Routing, routing: Routing, load: Sequence[int], has_rules: bool) -> LayerCall:
    """What became of the gate's routing `wanted`: `routing` ran, which is the same object where nothing changed it."""
    found = LayerCall(0, load, call.clock.seconds, call.bytes_exchanged)
    if call.first_shares is not None:
        found.first_shares = call.first_shares.tolist()
    if routing is not wanted:
        before = torch.bincount(wanted.expert_ids[wanted.kept], minlength=wanted.num_experts).tolist()
        found.dropped = sum(before) - sum(load)
        found.rerouted = int(((routing.expert_ids != wanted.expert_ids) & routing.kept).sum())
        found.load_before = before if has_rules else []
        found.overflowing = 0.0 if call.overflowing is None else float(call.overflowing)
    elif has_rules:
        found.load_before = load
    return found
