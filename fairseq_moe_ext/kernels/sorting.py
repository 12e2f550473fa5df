"""Assignments sorted by whom they go to. Legend: N = assignments, X = experts, or whatever they go to."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.cpu_routing import routing_for


def sort_assignments(ids: Tensor, kept: Tensor, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 below X = num_ids, kept bool, of any one shape of N elements -> which assignment each row is, (N,)
    int64; where each id's rows begin, (X + 1,) int32; which row each assignment is, (N,) int64, -1 where not kept.

    Within an id assignments rise; those that are not kept come last, and the last offset is where they begin. The host
    learns nothing of it.
    """
    routing = routing_for(ids, kept)
    if routing is not None:
        return routing.sort(ids, kept, num_ids)
    masked = ids.masked_fill(~kept, num_ids).view(-1)
    # stable, so that a token's rows in an expert keep the tokens' order: results do not depend on the sort
    ordered, assignments = masked.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_ids + 1, device=ids.device), out_int32=True)
    rows = torch.arange(assignments.numel(), device=ids.device)
    rows = torch.empty_like(rows).scatter_(0, assignments, rows).masked_fill(~kept.reshape(-1), -1)
    return assignments, offsets, rows
