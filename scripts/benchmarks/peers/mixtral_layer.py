"""The Mixtral block of transformers 5 with every implementation of its experts, and its floor. Served by serve.py.

Its expert is a gated SwiGLU of three matrices without biases: with two thirds of the hidden dim (to the nearest
multiple of 16) it has the weights and the arithmetic of ours.
"""

import sys

import torch
import torch.nn.functional as F
from layer_problem import CHOICES, Problem, floor_calls
from serve import Prepared, serve, without_room
from torch import Tensor

sys.modules["torchaudio"] = None  # fairseq's, in the main environment, is of another PyTorch; transformers needs none

from transformers import MixtralConfig  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: E402

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def prepare(size: dict) -> Prepared:
    problem = Problem.of(size)
    tokens, model_dim = problem.tokens.shape
    hidden_dim = 16 * round(2 * problem.hidden_dim / 3 / 16)
    values = 3 * model_dim * hidden_dim
    torch.manual_seed(size["seed"])
    block = build_block(problem, hidden_dim)
    names = {kind: f"transformers 5 Mixtral, {kind}" for kind in IMPLEMENTATIONS}
    # batched_mm gathers the weights of every token's experts
    left_out = without_room({names["batched_mm"]: 4 * tokens * CHOICES * values})
    calls = {}
    for kind, name in names.items():
        if name not in left_out:
            calls[name] = lambda kind=kind: run(block, kind, problem.tokens)
            check(block, calls[name](), problem)
    rows, gate_up, down = problem.rows(), block.experts.gate_up_proj[0].clone(), block.experts.down_proj[0].clone()
    calls |= floor_calls(lambda: expert(rows, gate_up, down), problem, values)
    return Prepared(calls, left_out, {"hidden_dim": hidden_dim, "weight_bytes": 4 * values})


def build_block(problem: Problem, hidden_dim: int) -> MixtralSparseMoeBlock:
    experts, model_dim = problem.gate.shape
    config = MixtralConfig(
        hidden_size=model_dim,
        intermediate_size=hidden_dim,
        num_local_experts=experts,
        num_experts_per_tok=CHOICES,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    block = MixtralSparseMoeBlock(config).eval().requires_grad_(False)
    block.gate.weight.copy_(problem.gate)
    for weights in block.experts.parameters():
        weights.normal_(std=weights.size(2) ** -0.5)
    return block


def run(block: MixtralSparseMoeBlock, implementation: str, tokens: Tensor) -> Tensor:
    block.experts.config._experts_implementation = implementation
    return block(tokens.unsqueeze(0))


def expert(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def check(block: MixtralSparseMoeBlock, found: Tensor, problem: Problem) -> None:
    """The first tokens' outputs, one by one."""
    for number, token in enumerate(problem.tokens[:8]):
        weights, chosen = F.softmax(problem.gate @ token, dim=0).topk(CHOICES)
        weights = weights / weights.sum()
        outputs = [expert(token, block.experts.gate_up_proj[j], block.experts.down_proj[j]) for j in chosen]
        wanted = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
        torch.testing.assert_close(found[0, number], wanted, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    serve(prepare)
