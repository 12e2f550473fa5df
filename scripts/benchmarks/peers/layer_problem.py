"""What every peer's layer computes: the same tokens, the same gate, hence the same experts for each token.

Legend: T = tokens, E = experts, K = choices (2), D = model dim, F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHOICES = 2


@dataclass(frozen=True)
class Problem:
    """tokens (T, D), gate (E, D), float32; capacity_fraction: slots of an expert / T, where a peer has slots."""

    tokens: Tensor
    gate: Tensor
    hidden_dim: int
    capacity_fraction: float

    @classmethod
    def of(cls, size: dict) -> Problem:
        """size: tokens, experts, model_dim, hidden_dim, capacity_fraction, seed."""
        generator = torch.Generator().manual_seed(size["seed"])
        tokens = torch.randn(size["tokens"], size["model_dim"], generator=generator)
        gate = torch.randn(size["experts"], size["model_dim"], generator=generator) * size["model_dim"] ** -0.5
        return cls(tokens, gate, size["hidden_dim"], size["capacity_fraction"])

    @property
    def num_experts(self) -> int:
        return self.gate.size(0)

    def active_experts(self) -> int:
        """How many experts have a token."""
        return len((self.tokens @ self.gate.T).topk(CHOICES, dim=1).indices.unique())

    def rows(self) -> Tensor:
        """(T * K, D): as many as all experts together compute."""
        return self.tokens.repeat(CHOICES, 1)


def floor_calls(dense: Callable[[], Tensor], problem: Problem, values_per_expert: int) -> dict[str, Callable]:
    """The two parts of a layer's floor: `dense`, its arithmetic on T * K rows through one expert, and one read of the
    active experts' weights."""
    weights = torch.rand(problem.active_experts() * values_per_expert)
    return {"dense": dense, "weights": lambda: torch.sum(weights)}
