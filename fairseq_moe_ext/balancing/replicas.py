"""How many copies every expert gets.

Legend: B = batches, E = experts, R = ranks.
"""

from __future__ import annotations

import heapq

import numpy as np

from fairseq_moe_ext.balancing.load import shares


def count_copies(loads: np.ndarray, world_size: int, replicas: int) -> np.ndarray:
    """(E,) int64: one copy per expert and `replicas` more, each for the expert whose copies then bear most.

    loads (B, E); the copies of an expert share its load evenly and lie on different ranks, so that an expert has R at
    most. Giving the next copy to the largest load per copy makes the largest of them as small as can be. ValueError
    where so many replicas find no rank.

    >>> count_copies(np.array([[6, 3, 1]]), 4, 3).tolist()
    [3, 2, 1]
    """
    num_experts = loads.shape[1]
    room = num_experts * (world_size - 1)
    if not 0 <= replicas <= room:
        raise ValueError(
            f"replicas must be 0 to {room}, a copy of each of {num_experts} experts on every one of {world_size} "
            f"ranks, got {replicas}"
        )
    copies = np.ones(num_experts, dtype=np.int64)
    load = shares(loads).sum(axis=0)
    hottest = [(-load[expert], expert) for expert in range(num_experts)]
    heapq.heapify(hottest)
    for _ in range(replicas):
        _, expert = heapq.heappop(hottest)
        copies[expert] += 1
        if copies[expert] < world_size:
            heapq.heappush(hottest, (-load[expert] / copies[expert], expert))
    return copies
