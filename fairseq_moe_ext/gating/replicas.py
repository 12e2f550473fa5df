"""Where the replicas of one layer's experts lie, and which replica an assignment goes to.

Legend: T = tokens, K = choices per token, E = experts, R = ranks, P = replicas of experts over all ranks, in rising
order of rank, then expert. Without replicas P = E.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Replicas:
    """The placement of one layer as `rank` sees it; `ranks_of_experts` lists the ranks of every expert.

    local: per rank the experts that lie there, rising.

    >>> Replicas(((0,), (1,), (0, 1)), rank=0, world_size=2).local
    [(0, 2), (1, 2)]
    """

    def __init__(self, ranks_of_experts: Sequence[Sequence[int]], rank: int, world_size: int):
        self.num_experts = len(ranks_of_experts)
        self.local = [
            tuple(expert for expert, ranks in enumerate(ranks_of_experts) if each in ranks)
            for each in range(world_size)
        ]
        self.per_rank = [len(local) for local in self.local]
        self.num_replicas = sum(self.per_rank)
        replicas: list[list[int]] = [[] for _ in ranks_of_experts]
        for replica, expert in enumerate(expert for local in self.local for expert in local):
            replicas[expert].append(replica)
        self._replicas = replicas
        self._rank = rank
        most = max(map(len, replicas))
        padded = [found + found[:1] * (most - len(found)) for found in replicas]
        self._table = torch.tensor([*padded, [0] * most])  # (E + 1, most), the last for what is not kept
        self._counts = torch.tensor([*map(len, replicas), 1])  # (E + 1,)
        self._in_order = [found[0] for found in replicas] == list(range(self.num_replicas))

    def choose(self, expert_ids: Tensor, kept: Tensor | None = None) -> Tensor:
        """expert_ids (T, K) -> the replica of each assignment (T, K); an expert's assignments go round its replicas.

        kept: (T, K) bool; what is not kept takes no turn, and its replica has no meaning. None keeps all.
        """
        if self._in_order:
            return expert_ids
        table, counts = self._table.to(expert_ids.device), self._counts.to(expert_ids.device)
        if table.size(1) == 1:
            return table[:, 0][expert_ids]
        flat = expert_ids if kept is None else expert_ids.masked_fill(~kept, self.num_experts)
        flat = flat.reshape(-1)
        order = flat.argsort(stable=True)
        load = torch.bincount(flat, minlength=self.num_experts + 1)
        first = (load.cumsum(0) - load)[flat[order]]
        number = torch.empty_like(flat)  # of an assignment among its expert's
        number[order] = torch.arange(flat.numel(), device=flat.device) - first
        # ranks begin with different replicas, else few assignments would all go to the first
        return table[flat, (number + self._rank) % counts[flat]].view_as(expert_ids)

    def fold(self, counts: Sequence[int]) -> list[int]:
        """counts: P numbers -> their sums per expert (E)."""
        return [sum(counts[replica] for replica in found) for found in self._replicas]

    def chosen_whole(self, rank: int) -> list[int]:
        """Per expert the one replica that all its slots on `rank` go to, under static gating."""
        return [found[rank % len(found)] for found in self._replicas]
