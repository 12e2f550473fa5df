"""What every peer's quantised experts compute: fc1, ReLU, fc2 of the same number of rows each.

Legend: E = experts, n = rows of an expert, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Of normally distributed weights and rows."""

    experts: int
    model_dim: int
    hidden_dim: int
    seed: int

    @classmethod
    def of(cls, case: dict) -> Problem:
        """case: experts, model_dim, hidden_dim, seed."""
        return cls(case["experts"], case["model_dim"], case["hidden_dim"], case["seed"])

    def weights(self) -> tuple[Tensor, Tensor]:
        """fc1 (E, F, D), fc2 (E, D, F)."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (self.hidden_dim, self.model_dim), (self.model_dim, self.hidden_dim)
        fc1, fc2 = (
            torch.randn(self.experts, *shape, generator=generator).mul_(shape[1] ** -0.5) for shape in shapes
        )
        return fc1, fc2

    def rows(self, count: int) -> Tensor:
        """(E, n, D)."""
        generator = torch.Generator().manual_seed(self.seed + count)
        return torch.randn(self.experts, count, self.model_dim, generator=generator)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Of all values together."""
    return float((found - wanted).norm() / wanted.norm())
