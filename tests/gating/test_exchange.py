"""Tokens travel between real processes: where each went and came back, and that the result is one rank's."""

import pytest
import torch
from cases import TOLERANCE, Case
from rank_group import ranks

from fairseq_moe_ext.gating.copies import ExpertCopies
from fairseq_moe_ext.gating.exchange import Exchange
from fairseq_moe_ext.gating.experts import ResidentExperts


@pytest.fixture(scope="module", params=[2, 3, 4])
def group(request):
    with ranks(request.param) as group:
        yield group


def split_layer(layer, placement, rank, world_size, exchange=None):
    """`layer` with the experts of `rank` alone, and the exchange with the others."""
    copies = ExpertCopies(placement, rank, world_size)
    experts = ResidentExperts(
        layer.experts.num_experts,
        layer.experts.model_dim,
        layer.experts.fc1_weight.size(1),
        layer.experts.activation,
        held=copies.held[rank],
    ).to(layer.experts.dtype)
    experts.load_state_dict(layer.experts.state_dict())
    exchange = exchange or Exchange(rank, world_size)
    layer.experts = experts
    layer.exchange = exchange.register(experts, copies)
    return exchange


def serve(rank, world_size, case, gating, placement, static, batches_of_rank):
    """Outputs and calls of this rank's batches, then answers until all are done."""
    layer = case.layer(gating, **static)
    exchange = split_layer(layer, placement, rank, world_size)
    results = []
    for seed in batches_of_rank[rank]:
        calls = []
        layer.observer = calls.append
        x, mask = case.with_(seed=seed).batch()
        with torch.no_grad():
            results.append((layer(x, mask), calls[0].load, calls[0].bytes_exchanged))
    while exchange.idle_round(alive=False):
        pass
    return results, exchange.rows_computed


def alone(case, gating, static, seed):
    layer = case.layer(gating, **static)
    calls = []
    layer.observer = calls.append
    x, mask = case.with_(seed=seed).batch()
    with torch.no_grad():
        return layer(x, mask), calls[0].load


def contiguous(num_experts, world_size):
    return [[expert * world_size // num_experts] for expert in range(num_experts)]


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_the_result_is_one_ranks(group, gating, num_choices):
    case = Case(num_choices=num_choices, num_experts=7, skew=2.0, padding="left")
    static = {"capacity_fraction": 0.3, "count_padding": False} if gating == "static" else {}
    batches = [[10 * rank + number for number in range(rank)] for rank in range(group.world_size)]
    served = group(serve, case, gating, contiguous(7, group.world_size), static, batches)
    for (results, _), seeds in zip(served, batches, strict=True):
        for (output, load, _), seed in zip(results, seeds, strict=True):
            expected, expected_load = alone(case, gating, static, seed)
            torch.testing.assert_close(output, expected, **TOLERANCE[case.dtype])
            assert load == expected_load
