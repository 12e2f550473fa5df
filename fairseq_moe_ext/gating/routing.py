"""Which experts a token goes to, and with which weights.

Legend: T = tokens, E = experts, K = choices per token, D = model dim.
The rules are those of upstream's `modules/moe/top1gate.py` and `top2gate.py` (fairseq, branches `moe` and `nllb`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe_ext.kernels.autocast import no_autocast
from fairseq_moe_ext.kernels.choosing import choose_experts, normalize

SECOND_EXPERT_POLICIES = ("all", "sampling", "random")


@dataclass(frozen=True)
class Routing:
    """The assignments of T tokens to K experts each, first choice first.

    expert_ids: (T, K) int64, in [0, E).
    kept: (T, K) bool; False where an assignment does not run (padding, a policy, a full expert).
    weights: (T, K) in the gate's dtype; weights of assignments that are not kept have no meaning.
    probabilities: (T, E) softmax of the gate's logits, in the gate's dtype.
    is_weighted: weights are those of the outputs' sum, and the gate normalises them no more.
    """

    expert_ids: Tensor
    kept: Tensor
    weights: Tensor
    probabilities: Tensor
    is_weighted: bool = False

    @property
    def num_experts(self) -> int:
        """E, of the layer."""
        return self.probabilities.size(1)

    def keep_only(self, fits: Tensor) -> Routing:
        """The same routing with the assignments dropped where `fits` ((T, K) bool) is False."""
        return replace(self, kept=self.kept & fits)


class Gate(nn.Module):
    """The network that scores experts: one bias-free linear map, `wg` in upstream's state dict.

    use_fp32: softmax and everything after it run in float32; the product with `wg` runs in the model's dtype
    (upstream's `moe_gating_use_fp32`), also under autocast.
    """

    num_choices: int
    is_random = False  # whether results depend on drawn numbers, and so on the batch

    def __init__(self, model_dim: int, num_experts: int, use_fp32: bool = False):
        super().__init__()
        if num_experts < self.num_choices:
            raise ValueError(
                f"num_experts must be at least {self.num_choices} for top-{self.num_choices} gating, got {num_experts}"
            )
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.use_fp32 = use_fp32

    @classmethod
    def of_model(cls, moe: Any, model_dim: int) -> Gate | None:
        """The gate of a model whose fields `moe` has, by upstream's names; None where it has another kind."""
        raise TypeError(f"{cls.__name__} does not say which models have it")

    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (T, D) -> logits (T, E), probabilities (T, E)."""
        if self.use_fp32:
            with no_autocast(tokens):
                logits = self.wg(tokens.to(self.wg.weight.dtype)).float()
        else:
            logits = self.wg(tokens)
        return logits, F.softmax(logits, dim=1)

    def seed(self, seed: int) -> None:
        """Make the random policies draw from a generator of their own; a gate without one draws nothing."""

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """tokens (T, D), padding_mask (T,) bool with True on padding -> the routing before any capacity."""
        raise TypeError(f"{type(self).__name__} does not say how experts are chosen")

    def combine_weights(self, routing: Routing) -> Tensor:
        """(T, K) weights of the outputs' sum in the gate's dtype, zero where an assignment is not kept."""
        kept_alone = only_kept if routing.is_weighted else self.normalize
        return kept_alone(routing.weights, routing.kept)

    def normalize(self, weights: Tensor, kept: Tensor) -> Tensor:
        """weights and kept (T, K) -> what the gate makes of them once nothing else is dropped, zero where not kept."""
        return only_kept(weights, kept)


def only_kept(values: Tensor, kept: Tensor) -> Tensor:
    """values and kept (T, K) -> the values, exactly zero where an assignment is not kept, whatever padding made them.

    A product with `kept` would leave NaN where it was, and what weighs something is read.
    """
    return values.masked_fill(~kept, 0)


class Top1Gate(Gate):
    """One expert per token, weighted by its softmax probability, which is never renormalised."""

    num_choices = 1

    @classmethod
    def of_model(cls, moe: Any, model_dim: int) -> Top1Gate | None:
        """As `Gate` has it: models with `moe_top1_expert`."""
        return cls(model_dim, moe.moe_expert_count, moe.moe_gating_use_fp32) if moe.moe_top1_expert else None

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """As `Gate` has it, K = 1; the weight is the softmax probability."""
        _, probabilities = self.score(tokens)
        return Routing(*choose_experts(probabilities, None, padding_mask), probabilities)


class Top2Gate(Gate):
    """Two experts per token, their weights normalised to sum to 1.

    second_expert_policy: `all` takes the second best; `sampling` the best of the rest under Gumbel noise; `random`
    keeps the second best with a probability of twice its gate probability. The last two stay random in evaluation,
    as upstream's do.
    normalize_before_dropping: normalise before the capacity drops assignments (upstream's
    `moe_normalize_gate_prob_before_dropping`); else afterwards, so that a lone survivor has weight 1.
    """

    num_choices = 2

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        use_fp32: bool = False,
        second_expert_policy: str = "sampling",
        normalize_before_dropping: bool = False,
    ):
        super().__init__(model_dim, num_experts, use_fp32)
        if second_expert_policy not in SECOND_EXPERT_POLICIES:
            raise ValueError(
                f"second_expert_policy must be one of {', '.join(SECOND_EXPERT_POLICIES)}, got {second_expert_policy!r}"
            )
        self.second_expert_policy = second_expert_policy
        self.is_random = second_expert_policy != "all"
        self.normalize_before_dropping = normalize_before_dropping
        self._seed: int | None = None
        self._generator: torch.Generator | None = None

    @classmethod
    def of_model(cls, moe: Any, model_dim: int) -> Top2Gate | None:
        """As `Gate` has it: models without `moe_top1_expert`."""
        if moe.moe_top1_expert:
            return None
        return cls(
            model_dim,
            moe.moe_expert_count,
            moe.moe_gating_use_fp32,
            moe.moe_second_expert_policy,
            moe.moe_normalize_gate_prob_before_dropping,
        )

    def seed(self, seed: int) -> None:
        """As `Gate` has it."""
        self._seed, self._generator = seed, None

    def _random(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) of the shape, dtype and device of `like`; the global stream without a seed."""
        if self._seed is None:
            return torch.rand_like(like)
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=self._generator)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """As `Gate` has it, K = 2; weights are probabilities, or add up to 1 where normalised before dropping."""
        logits, probabilities = self.score(tokens)
        if self.second_expert_policy == "sampling":
            # Gumbel-max: argmax(logits + noise) draws from the softmax
            logits = logits.float()  # half-precision noise is too coarse: it would favour some experts
            tiny = torch.finfo(torch.float32).tiny
            logits = logits - (-self._random(logits).clamp_min(tiny).log()).clamp_min(tiny).log()
        expert_ids, kept, weights = choose_experts(probabilities, logits, padding_mask)
        if self.normalize_before_dropping:
            weights = normalize(weights, torch.ones_like(kept))
        if self.second_expert_policy == "random":
            second_weight = weights[:, 1]
            drawn = 2 * second_weight > self._random(second_weight)
            kept = kept & torch.stack((torch.ones_like(drawn), drawn), dim=1)
        return Routing(expert_ids, kept, weights, probabilities)

    def normalize(self, weights: Tensor, kept: Tensor) -> Tensor:
        """As `Gate` has it: to a sum of 1 over what is kept, unless that was done before dropping."""
        return only_kept(weights, kept) if self.normalize_before_dropping else normalize(weights, kept)


GATES: list[type[Gate]] = [Top1Gate, Top2Gate]


def gate_of_model(moe: Any, model_dim: int) -> Gate:
    """The gate of a model whose fields `moe` has, by upstream's names: the first of GATES that is of such models."""
    return next(gate for kind in GATES if (gate := kind.of_model(moe, model_dim)) is not None)
