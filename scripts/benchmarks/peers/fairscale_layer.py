"""fairscale's MOELayer with this plugin's weights, and its gate's choices as dense masks. Served by serve.py."""

import sys
from pathlib import Path

import torch
from layer_problem import CHOICES, Problem
from our_layer import build_layer
from serve import Prepared, serve, without_room

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_layer import fairscale_layer  # noqa: E402

from fairseq_moe_ext.gating import MOELayer  # noqa: E402
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for  # noqa: E402
from fairseq_moe_ext.gating.static import static_capacity  # noqa: E402

NAME = "fairscale MOELayer"


def prepare(size: dict) -> Prepared:
    problem = Problem.of(size)
    tokens, experts = problem.tokens.size(0), problem.num_experts
    if tokens % experts:
        return Prepared({}, {NAME: "wants tokens in multiples of the experts"})
    capacity = static_capacity(tokens, experts, CHOICES, problem.capacity_fraction, training=False)
    masks = tokens * experts * capacity  # (T, E, C), as floats and as bools, more than one at a time
    slots = experts * capacity * 3 * problem.tokens.size(1)
    no_room = without_room({NAME: 4 * (4 * masks + slots)})
    if no_room:
        return Prepared({}, no_room)
    ours = build_layer(problem, size["seed"])
    gating = dispatcher_for("static", StaticOptions(problem.capacity_fraction))
    static = MOELayer(ours.gate, ours.experts, gating).eval()
    static.prepare_for_serving(size["seed"])
    layer, x = fairscale_layer(static), problem.tokens.unsqueeze(1)
    found = layer(x)
    if problem.capacity_fraction >= 1:  # nothing drops
        torch.testing.assert_close(found, torch.load(size["output"]), atol=1e-4, rtol=1e-4)
    return Prepared({NAME: lambda: layer(x)}, facts={"capacity": capacity})


if __name__ == "__main__":
    serve(prepare)
