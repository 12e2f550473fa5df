"""One layer's placement by any of the methods, never worse than upstream's.

Legend: B = batches, E = experts, R = ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.balancing.exact import exact
from fairseq_moe_ext.balancing.load import Balance, balance, rank_shares
from fairseq_moe_ext.balancing.local_search import local_search
from fairseq_moe_ext.balancing.placement import LayerPlacement, contiguous
from fairseq_moe_ext.balancing.replicas import count_copies
from fairseq_moe_ext.balancing.rules import rules_for
from fairseq_moe_ext.balancing.solvers import anti_correlation, greedy

METHODS = ("contiguous", "greedy", "anti-correlation", "local-search", "exact")


@dataclass(frozen=True)
class Demand:
    """What is asked of a placement.

    `replicas`: slots beyond one per expert, over all ranks; `experts_per_rank`: a rank's memory budget, by default as
    even as can be; `time_limit`: seconds for each of `local-search` and `exact`. ValueError where one is out of range.
    """

    world_size: int
    replicas: int = 0
    experts_per_rank: int | None = None
    time_limit: float = 10.0

    def __post_init__(self):
        for name, least in (("world_size", 1), ("replicas", 0), ("experts_per_rank", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {value}")
        if not self.time_limit > 0:
            raise ValueError(f"time limit must be above 0 seconds, got {self.time_limit}")


@dataclass(frozen=True)
class Solution:
    """A layer's placement by every method; `bound`: no placement's Avg Max Load on the same loads falls below it.

    With replicas the bound holds for the number of copies per expert that was chosen.
    """

    methods: dict[str, LayerPlacement]
    bound: float


def solve(loads: np.ndarray, demand: Demand) -> Solution:
    """Place E experts by loads (B, E), tokens or active steps, by every method of METHODS.

    `local-search` starts from `greedy`'s, `exact` from all of them. A placement that is less even on these loads than
    `contiguous` (Avg Max Load, ties by Max Load) is given up for that one, its replicas too; where ranks outnumber
    experts there is no `contiguous`. ValueError where the demand cannot be met.
    """
    num_experts, world_size = loads.shape[1], demand.world_size
    rules = rules_for(count_copies(loads, world_size, demand.replicas), world_size, demand.experts_per_rank)
    found = {"greedy": greedy(loads, rules), "anti-correlation": anti_correlation(loads, rules)}
    found["local-search"] = local_search(found["greedy"], loads, rules, demand.time_limit)
    best = exact(loads, rules, demand.time_limit, list(found.values()))
    found["exact"] = best.ranks
    methods = {method: rules.layer(ranks) for method, ranks in found.items()}
    if world_size > num_experts:
        return Solution(methods, best.bound)
    upstream = contiguous(num_experts, world_size)
    for method, layer in methods.items():
        methods[method] = min(layer, upstream, key=lambda layer: evenness(loads, layer, world_size))
    bound = min(best.bound, evenness(loads, upstream, world_size).avg_max_load)
    return Solution({"contiguous": upstream, **methods}, bound)


def evenness(loads: np.ndarray, layer: LayerPlacement, world_size: int) -> Balance:
    """Max Load and Avg Max Load of a layer's placement on loads (B, E)."""
    return balance(rank_shares(loads, layer, world_size))
