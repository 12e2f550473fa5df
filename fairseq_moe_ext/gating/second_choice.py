"""Fewer choices for easy tokens: a token's second expert does not run where its share of the two is small.

Source: AdapMoE (arXiv 2408.10284), without its sensitivities of layers. A token's decision depends on its own two gate
probabilities alone, so that results do not depend on its batch.

Legend: T = tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_moe_ext.gating.call import Call
from fairseq_moe_ext.gating.routing import Routing

BINS = 20  # of the first choice's share g1 / (g1 + g2), from 1/2 to 1


class SecondChoice:
    """Drops the second choice of tokens whose g2 / (g1 + g2) is below `threshold` (0: none); a Rule."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def seed(self, seed: int) -> None:
        """Nothing is drawn."""

    def __call__(self, routing: Routing, call: Call) -> Routing:
        """As `Rule` has it; what remains of a token is weighted as the gate weights a lone choice."""
        first, second = routing.weights.float().unbind(1)  # normalised or not, the ratio is the same
        share = second / (first + second)  # (T,)
        both = routing.kept.all(dim=1)
        call.first_shares = first_shares(1 - share[both])
        enough = (share < self.threshold).logical_not()  # what is no number stays
        if self.threshold == 0:
            return routing
        return routing.keep_only(torch.stack((torch.ones_like(enough), enough), dim=1))


def first_shares(shares: Tensor) -> Tensor:
    """shares (T,) from 1/2 to 1 -> how many lie in each of BINS equal parts (BINS,) int64, 1 in the last.

    >>> first_shares(torch.tensor([0.5, 0.51, 0.99, 1.0])).tolist()[::19]
    [2, 2]
    """
    places = ((shares.nan_to_num(0.5) - 0.5) * (2 * BINS)).long().clamp(0, BINS - 1)
    return torch.bincount(places, minlength=BINS)
