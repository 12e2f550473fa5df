"""This plugin's layer under dynamic gating, and the floor of fc1, ReLU, fc2 with biases. Served by serve.py."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from layer_problem import Problem, floor_calls
from serve import Prepared, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from fairseq_moe_ext.atomic_file import new_file  # noqa: E402
from fairseq_moe_ext.experts.resident import ResidentExperts  # noqa: E402
from fairseq_moe_ext.gating import MOELayer, Top2Gate  # noqa: E402


def prepare(size: dict) -> Prepared:
    problem = Problem.of(size)
    layer = build_layer(problem, size["seed"])
    expert = [weights[0].detach().clone() for weights in layer.experts.parameters()]
    values = sum(weights.numel() for weights in expert)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = expert
    layer.prepare_for_serving(size["seed"])
    x, rows = problem.tokens.unsqueeze(1), problem.rows()
    calls = {"ours, dynamic": lambda: layer(x)}
    calls |= floor_calls(
        lambda: F.linear(F.relu(F.linear(rows, fc1_weight, fc1_bias)), fc2_weight, fc2_bias), problem, values
    )
    with new_file(size["output"]) as file:
        torch.save(calls["ours, dynamic"](), file)
    return Prepared(calls, facts={"active_experts": problem.active_experts(), "weight_bytes": 4 * values})


def build_layer(problem: Problem, seed: int) -> MOELayer:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    model_dim = problem.tokens.size(1)
    gate = Top2Gate(model_dim, problem.num_experts, use_fp32=True, second_expert_policy="all")
    layer = MOELayer(gate, ResidentExperts(problem.num_experts, model_dim, problem.hidden_dim)).eval()
    gate.wg.weight.data.copy_(problem.gate)
    return layer.requires_grad_(False)


if __name__ == "__main__":
    serve(prepare)
