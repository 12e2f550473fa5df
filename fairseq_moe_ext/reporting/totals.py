"""Sums of what was served: over the passes of a stack, over the calls of a layer.

Legend: E = experts, R = ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fairseq_moe_ext.experts.buffer_call import BufferCall
from fairseq_moe_ext.gating.call import LayerCall
from fairseq_moe_ext.reporting.weight_error import WeightError

_COUNTS = ("calls", "assignments", "dropped", "rerouted", "active_experts", "bytes_exchanged")


@dataclass
class PassTotals:
    """Passes of one stack: tokens that entered (padding not counted), passes, host seconds."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, 0 where no time was taken."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class LayerTotals:
    """Sums over the calls of one MoE layer (see LayerCall); load_per_rank has R entries, or none on one rank."""

    name: str
    calls: int = 0
    assignments: int = 0
    dropped: int = 0
    active_experts: int = 0
    load: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_exchanged: int = 0
    load_per_rank: list[int] = field(default_factory=list)
    buffer: BufferCall = BufferCall()
    rerouted: int = 0
    load_before: list[int] = field(default_factory=list)
    overflowing: float = 0.0
    first_shares: list[int] = field(default_factory=list)
    weight_error: WeightError = WeightError()

    def add(self, call: LayerCall) -> None:
        """Count one more call."""
        self.add_totals(
            LayerTotals(
                self.name,
                calls=1,
                assignments=call.assignments,
                dropped=call.dropped,
                active_experts=sum(count > 0 for count in call.load),
                load=list(call.load),
                seconds=call.seconds,
                bytes_exchanged=call.bytes_exchanged,
                rerouted=call.rerouted,
                load_before=call.load_before,
                overflowing=call.overflowing,
                first_shares=list(call.first_shares),
            )
        )

    def add_totals(self, other: LayerTotals) -> None:
        """Add what the same layer did in other calls, or on another rank."""
        for name in (*_COUNTS, "overflowing", "buffer", "weight_error"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("load", "load_before", "load_per_rank", "first_shares"):
            setattr(self, name, _sums(getattr(self, name), getattr(other, name)))
        for part, seconds in other.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @property
    def active_experts_mean(self) -> float:
        """Experts with tokens per call, 0 without a call."""
        return self.active_experts / self.calls if self.calls else 0.0


def _sums(a: list[int], b: list[int]) -> list[int]:
    """Elementwise; an empty list stands for zeros."""
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else list(a or b)
