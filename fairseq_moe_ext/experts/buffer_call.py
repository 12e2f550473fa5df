"""What experts in slower memory cost a call."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add


@dataclass(frozen=True)
class BufferCall:
    """What one call, or several together, took where not all experts are resident.

    hits, misses: active experts that were resident at their turn, and those that were not. bytes_copied: into fast
    memory. host_reads, disk_reads: misses by where they came from. bytes_read: from disk. prefetched: misses whose
    copies began before their call; prefetched_in_vain: experts that were copied and not asked for, which are in the
    bytes, too. seconds: the host waited.
    """

    hits: int = 0
    misses: int = 0
    bytes_copied: int = 0
    host_reads: int = 0
    disk_reads: int = 0
    bytes_read: int = 0
    prefetched: int = 0
    prefetched_in_vain: int = 0
    seconds: float = 0.0

    def __add__(self, other: BufferCall) -> BufferCall:
        return BufferCall(*map(add, vars(self).values(), vars(other).values()))  # in the order of the fields
