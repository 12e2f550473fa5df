"""What a replay is told that things cost, and what it finds that a run costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Rates:
    """What things cost. expert_seconds: of a computed expert; row_seconds: of each of its rows besides. dense_seconds:
    of everything else, per call of a MoE layer. miss_seconds: what the computation spends on a missed expert besides,
    as on a step of its own. disk_rate: bytes/s of all readers together; latency: seconds of a read. ValueError where
    one is out of range."""

    expert_bytes: float
    disk_rate: float
    latency: float = 0
    readers: int = 1
    expert_seconds: float = 0
    row_seconds: float = 0
    dense_seconds: float = 0
    miss_seconds: float = 0

    def __post_init__(self):
        for each in fields(self):
            value, positive = getattr(self, each.name), each.name in ("expert_bytes", "disk_rate", "readers")
            if not (0 < value if positive else 0 <= value) or value == float("inf"):
                raise ValueError(f"{each.name} must be {'above 0' if positive else '0 or more'}, got {value}")

    def computation(self, rows: Iterable[int]) -> float:
        """Of experts with so many rows each."""
        return sum(self.expert_seconds + int(count) * self.row_seconds for count in rows)

    def least_reading(self, reads: int) -> float:
        """No disk with these readers, and one for prefetches, is faster: by its rate, nor by what each reader does."""
        alone = self.latency + self.expert_bytes / self.disk_rate
        return reads * max(self.expert_bytes / self.disk_rate, alone / (self.readers + 1))


@dataclass(frozen=True)
class Costs:
    """Of some calls. seconds: until the last one's end; waited: of them for copies; resident: what the same takes where
    every expert is resident. reads: experts read from disk; in_vain: of them those that were prefetched and pushed out,
    or not wanted by their layer's next call, or never called for."""

    calls: int = 0
    accesses: int = 0
    misses: int = 0
    seconds: float = 0
    waited: float = 0
    resident: float = 0
    reads: int = 0
    in_vain: int = 0

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))
