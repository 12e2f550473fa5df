"""What training wants to know of a routing: the gate loss and upstream's metadata, by upstream's names.

Legend: T = tokens, E = experts, K = choices per token. Source: upstream's `top1gate.py` and `top2gate.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_ext.gating.routing import Routing

# the share of experts that "balance_top" and "balance_bottom" sum over
SAMPLE_FRACTION = 0.2


@dataclass(frozen=True)
class CallStatistics:
    """One call of a layer: its routing before and after the capacity.

    loss: the gate loss, where the call kept no graph and its caller did (an activation checkpoint).
    """

    before: Routing
    after: Routing
    loss: Tensor | None = None

    def gate_loss(self) -> Tensor:
        """The call's gate loss, a scalar with gradients in training; computed here where the call has not done it."""
        return gate_loss(self.before) if self.loss is None else self.loss

    def metadata(self) -> dict[str, Tensor]:
        """Upstream's figures of the routing, by upstream's names."""
        return routing_metadata(self.before, self.after)


def gate_loss(routing: Routing) -> Tensor:
    """The load-balancing loss of GShard: scalar, differentiable through the probabilities.

    `routing` is the gate's, before any capacity. Padding counts in the mean of the probabilities and not in the share
    of first choices, as upstream has it.
    """
    probabilities = routing.probabilities  # (T, E)
    num_experts = routing.num_experts
    first = torch.zeros_like(probabilities).scatter(
        1, routing.expert_ids[:, :1], routing.kept[:, :1].to(probabilities.dtype)
    )
    return (probabilities.mean(dim=0) * first.mean(dim=0)).mean() * num_experts * num_experts


@torch.no_grad()
def routing_metadata(before: Routing, after: Routing) -> dict[str, Tensor]:
    """Upstream's metadata of one layer's routing, before and after its capacity; scalars, in per cent where shares."""
    probabilities = before.probabilities
    num_tokens, num_experts = probabilities.shape
    eps = torch.finfo(probabilities.dtype).eps
    entropy = -(probabilities * probabilities.clamp(eps, 1 - eps).log()).sum(dim=1)
    metadata = {"entropy_gating": entropy.mean()}
    sample = max(math.ceil(num_experts * SAMPLE_FRACTION), 1)
    for k in range(before.expert_ids.size(1)):
        name = f"expert{k + 1}"
        wanted = before.kept[:, k].sum()
        metadata[f"overflow_{name}"] = 100 * (wanted - after.kept[:, k].sum()) / wanted
        histogram = 100 * torch.bincount(before.expert_ids[:, k], minlength=num_experts).float() / num_tokens
        metadata[f"unused_{name}_count"] = (histogram == 0).sum()
        histogram = histogram.sort(descending=True).values
        metadata[f"{name}_balance_top"] = histogram[:sample].sum()
        metadata[f"{name}_balance_bottom"] = histogram[-sample:].sum()
    return metadata
