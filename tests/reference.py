"""A naive twin of one Mixture-of-Experts layer: loops over tokens, choices and experts, one token at a time.

Written from upstream's semantics (fairseq's branches moe and nllb, modules/moe), not from the package's code.
Only the gate's product and softmax run on the whole batch: one rounding may decide between two experts, and it must
be the same rounding. Legend: B = sentences, L = positions, T = tokens, E = experts, K = choices, D = model dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NO_SLOT = -1


@dataclass(frozen=True)
class Expert:
    """One expert's weights: fc1 (F, D), (F,), fc2 (D, F), (D,)."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __call__(self, token: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """token (D,) -> (D,), in float64."""
        hidden = activation(self.fc1_weight.double() @ token.double() + self.fc1_bias.double())
        return self.fc2_weight.double() @ hidden + self.fc2_bias.double()


@dataclass(frozen=True)
class Outcome:
    """What became of every token.

    output: (B, L, D). expert_ids, slots, wanted, kept: T lists of K; slots count from 0 and are NO_SLOT for
    assignments that never queue; wanted is before the capacity, kept after. weights: T lists of K, 0 where not kept.
    """

    output: Tensor
    expert_ids: list[list[int]]
    slots: list[list[int]]
    wanted: list[list[bool]]
    kept: list[list[bool]]
    weights: list[list[float]]

    def load(self, num_experts: int) -> list[int]:
        """Tokens that each expert ran."""
        counts = [0] * num_experts
        for experts, flags in zip(self.expert_ids, self.kept, strict=True):
            for expert, flag in zip(experts, flags, strict=True):
                counts[expert] += flag
        return counts


def capacity_of(
    num_tokens: int,
    num_experts: int,
    num_choices: int,
    fraction: float,
    training: bool,
    counted: int | None = None,
) -> int:
    """Section 1's table; `counted` stands for the tokens in evaluation (`moe_eval_capacity_max_seqlen`) alone."""
    if training or fraction <= 0:
        per_expert = math.ceil(num_tokens / num_experts)
        return 2 * per_expert if num_choices == 2 else int(1.0 * per_expert)
    return math.ceil(fraction * (num_tokens if counted is None else counted))


def gate_scores(tokens: Tensor, wg: Tensor, use_fp32: bool) -> tuple[Tensor, Tensor]:
    """Logits and probabilities (T, E): the product in the model's dtype, the softmax in fp32 if asked."""
    logits = torch.nn.functional.linear(tokens, wg)
    if use_fp32:
        logits = logits.float()
    return logits, torch.softmax(logits, dim=1)


def choose(logits: Tensor, probabilities: Tensor, num_choices: int) -> list[list[int]]:
    """The experts of every token by the policy `all`; of equals, the one with the lower number."""
    chosen = []
    for row, scores in zip(logits.tolist(), probabilities.tolist(), strict=True):
        first = max(range(len(scores)), key=lambda e: (scores[e], -e))
        experts = [first]
        if num_choices == 2:
            experts.append(max((e for e in range(len(row)) if e != first), key=lambda e: (row[e], -e)))
        chosen.append(experts)
    return chosen


def queue(expert_ids: list[list[int]], wanted: list[list[bool]], order: list[int]) -> list[list[int]]:
    """Slots in the order given; all first choices queue before any second choice."""
    waiting: dict[int, int] = {}
    slots = [[NO_SLOT] * len(experts) for experts in expert_ids]
    for choice in range(len(expert_ids[0]) if expert_ids else 0):
        for token in order:
            if wanted[token][choice]:
                expert = expert_ids[token][choice]
                slots[token][choice] = waiting.get(expert, 0)
                waiting[expert] = slots[token][choice] + 1
    return slots


def normalised(gates: list[float], eps: float) -> list[float]:
    total = max(sum(gates), eps)
    return [gate / total for gate in gates]


def moe_layer(
    x: Tensor,
    wg: Tensor,
    experts: list[Expert],
    *,
    num_choices: int = 2,
    padding_mask: Tensor | None = None,
    capacity: int | None = None,
    use_fp32: bool = False,
    normalize_before_dropping: bool = False,
    batch_prioritized: bool = False,
    output_masking: float = 0.0,
    activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Outcome:
    """One layer in evaluation on x (B, L, D); padding_mask (B, L), True on padding; capacity None is infinite."""
    tokens = x.reshape(-1, x.size(2))
    logits, probabilities = gate_scores(tokens, wg, use_fp32)
    eps = torch.finfo(probabilities.dtype).eps
    gates = probabilities.tolist()
    padded = [False] * len(gates) if padding_mask is None else padding_mask.reshape(-1).tolist()

    expert_ids = choose(logits, probabilities, num_choices)
    weights = [[row[expert] for expert in chosen] for row, chosen in zip(gates, expert_ids, strict=True)]
    if num_choices == 2 and normalize_before_dropping:
        weights = [normalised(pair, eps) for pair in weights]

    wanted = [[not flag] * num_choices for flag in padded]
    order = list(range(len(gates)))
    if batch_prioritized:
        order.sort(key=lambda token: -max(gates[token]))
    slots = queue(expert_ids, wanted, order)
    kept = [
        [want and (capacity is None or slot < capacity) for want, slot in zip(wants, row, strict=True)]
        for wants, row in zip(wanted, slots, strict=True)
    ]
    weights = [
        [gate if flag else 0.0 for gate, flag in zip(pair, flags, strict=True)]
        for pair, flags in zip(weights, kept, strict=True)
    ]
    if num_choices == 2 and not normalize_before_dropping:
        weights = [normalised(pair, eps) for pair in weights]

    output = torch.zeros(tokens.shape, dtype=torch.float64)
    for number, token in enumerate(tokens):
        for expert, flag, weight in zip(expert_ids[number], kept[number], weights[number], strict=True):
            if flag:
                cast = torch.tensor(weight, dtype=x.dtype).item()  # combine weights return to the model's dtype
                output[number] += cast * (1 - output_masking) * experts[expert](token, activation)
    return Outcome(output.to(x.dtype).view_as(x), expert_ids, slots, wanted, kept, weights)


def gate_loss(probabilities: Tensor, first_experts: list[int], padded: list[bool]) -> float:
    """GShard's l_aux: mean over experts of (mean probability * share of first choices), times E * E."""
    rows = probabilities.tolist()
    num_tokens, num_experts = len(rows), len(rows[0])
    total = 0.0
    for expert in range(num_experts):
        mean_gate = sum(row[expert] for row in rows) / num_tokens
        chosen = sum(first == expert and not pad for first, pad in zip(first_experts, padded, strict=True))
        total += mean_gate * chosen / num_tokens
    return total / num_experts * num_experts * num_experts
