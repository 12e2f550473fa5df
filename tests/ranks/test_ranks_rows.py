"""A row's result between two real processes: to the last bit what it is on one, whatever stands in padding."""

import pytest
import torch
from activations import ACTIVATIONS
from cases import Case
from rank_group import ranks
from rank_layers import contiguous, quantized, split_layer

from fairseq_moe_ext.experts.formats import QUANTIZED
from fairseq_moe_ext.kernels.cpu_kernel import load_kernel
from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.process_group import start_group

WITH_KERNEL = pytest.mark.skipif(load_kernel() is None, reason="PyTorch's product rounds by the number of rows")
STATIC = {"capacity_fraction": 0.3, "count_padding": False}


@pytest.fixture(scope="module")
def two_ranks():
    with ranks(2) as group:
        yield group


def case_of(rank: int, rows: int) -> Case:
    return Case(num_experts=5, model_dim=9, hidden_dim=37, rows=rows, positions=3, padding="scattered", seed=rank)


def layer_of(name: str, gating: str = "dynamic"):
    return case_of(0, 1).layer(gating, activation=ACTIVATIONS[name], **(STATIC if gating == "static" else {}))


def output_on(layer, case: Case, value: float = 0.0):
    x, mask = case.batch()
    with torch.no_grad():
        return layer(x.masked_fill(mask.unsqueeze(2), value), mask)


def on_two_ranks(rank, world_size, name, gating, rows_of_ranks, value, weights="float"):
    """The output of this rank's batch, by a layer whose experts lie on both ranks, with `value` in padding."""
    layer = layer_of(name, gating)
    exchange = Exchange(start_group())
    split_layer(layer, contiguous(5, world_size), rank, world_size, exchange, weights)
    output = output_on(layer, case_of(rank, rows_of_ranks[rank]), value)
    exchange.idle_round(alive=False)
    return output


@pytest.mark.parametrize("rows_of_ranks", [(0, 5), pytest.param((3, 5), marks=WITH_KERNEL)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ranks_do_not_change_a_bit(two_ranks, name, rows_of_ranks):
    for rank, output in enumerate(two_ranks(on_two_ranks, name, "dynamic", rows_of_ranks, 0.0)):
        assert torch.equal(output, output_on(layer_of(name), case_of(rank, rows_of_ranks[rank])))


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("weights", QUANTIZED)
def test_ranks_do_not_change_a_bit_of_quantised_experts(two_ranks, weights, gating):
    """Static gating's slots are those of the largest rank: rows of other ranks' slots come beside."""
    rows_of_ranks = (3, 5)
    for rank, output in enumerate(two_ranks(on_two_ranks, "gelu", gating, rows_of_ranks, 0.0, weights)):
        layer = layer_of("gelu", gating)
        layer.use(experts=quantized(layer.experts, weights, layer.experts.state_dict()))
        assert torch.equal(output, output_on(layer, case_of(rank, rows_of_ranks[rank])))


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_what_stands_in_padding_comes_nowhere(two_ranks, gating):
    clean = two_ranks(on_two_ranks, "relu", gating, (3, 5), 0.0)
    for value in (float("nan"), float("inf")):
        for rank, output in enumerate(two_ranks(on_two_ranks, "relu", gating, (3, 5), value)):
            assert torch.equal(output, clean[rank]) and output.isfinite().all()
            assert not output[case_of(rank, (3, 5)[rank]).batch()[1]].any()


def gradient_through(rank, world_size):
    layer = layer_of("relu")
    exchange = Exchange(start_group())
    split_layer(layer, contiguous(5, world_size), rank, world_size, exchange)
    output = layer(case_of(rank, 3).batch()[0].requires_grad_())
    exchange.idle_round(alive=False)
    try:
        output.sum().backward()
    except RuntimeError as error:
        return str(error)


def test_experts_on_several_ranks_refuse_gradients_that_would_lack_a_part(two_ranks):
    words = "experts on several ranks have no gradients: serve them under torch.no_grad()"
    assert two_ranks(gradient_through) == [words] * 2
