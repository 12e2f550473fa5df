"""The exchange's time, the stretched routing, and a layer's time, beside naive twins and worked by hand."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.process_group import RankGroup
from reproduction.cluster import Device, Network, systems
from reproduction.layer_costs import LayerCosts, Shape
from reproduction.scaling_validation import LayerRequest, routed_layer, tokens_for, whole_rows
from reproduction.step_model import dynamic_layer, rows_sent, static_layer, stretch

HERE = Device("here", flops=100.0, memory=10.0, element=4)
COSTS = LayerCosts(HERE, 2, 4, (1, 3), (2.0, 4.0), 0.5, 0.25, 0.001, 0.002)
FREE = Network(1e30, 1e30, 1e30, latency=0.0)


def naive_exchange(network, sent):
    ranks, per_node = len(sent), network.ranks_per_node
    times = [0.0]
    for rank in range(ranks):
        for way in (sent, sent.T):
            near = sum(way[rank, other] for other in range(ranks)
                       if other != rank and other // per_node == rank // per_node)
            away = sum(way[rank, other] for other in range(ranks) if other // per_node != rank // per_node)
            times += [near / network.nvlink, away / network.pcie]
    for node in range(-(-ranks // per_node)):
        for way in (sent, sent.T):
            leaving = sum(way[rank, other] for rank in range(ranks) for other in range(ranks)
                          if rank // per_node == node != other // per_node)
            times.append(leaving / network.network)
    return max(times) + network.latency + network.message * (ranks - 1)


@pytest.mark.parametrize("speeds", [(1.0, 50.0, 70.0), (50.0, 1.0, 70.0), (90.0, 80.0, 3.0)])
def test_an_exchange_beside_the_naive_one(speeds):
    network = Network(*speeds, latency=0.5, message=0.1, ranks_per_node=3)
    for ranks in (2, 3, 7):
        sent = np.random.default_rng(ranks).random((ranks, ranks)) * 10
        assert network.exchange(sent) == pytest.approx(naive_exchange(network, sent))
    assert network.exchange(np.ones((1, 1))) == 0.0


def test_stretching_keeps_every_ranks_share():
    loads = np.random.default_rng(0).integers(0, 9, (5, 32))
    wide = stretch(loads, 512)
    np.testing.assert_allclose(wide.sum(axis=1), 1)
    for ranks in (2, 8, 32):
        recorded = (loads / loads.sum(axis=1, keepdims=True)).reshape(5, ranks, -1).sum(axis=2)
        np.testing.assert_allclose(wide.reshape(5, ranks, -1).sum(axis=2), recorded)


def test_each_rank_has_a_batch_of_its_own():
    batches = np.eye(3)
    assert rows_sent(batches, step=1, ranks=2, tokens=5).tolist() == [[0, 0, 10], [10, 0, 0]]


def test_an_experts_time():
    assert COSTS.expert(np.array([0, 0.5, 1, 2, 3, 5])).tolist() == [0, 1, 2, 3, 4, 6]


def test_a_dynamic_layer_by_hand():
    rows = np.array([[3.0, 1.0, 0.0], [2.0, 0.0, 2.0]])  # 2 tokens a rank
    slow = Network(8.0, 8.0, 8.0, latency=0.0)
    layer = dynamic_layer(rows, [0, 1, 0], COSTS, slow)
    assert layer.gate == 0.5 * 2 and layer.move == 0.25 * 2
    assert layer.experts == 6 + 3  # 5 and 2 rows
    assert layer.largest_share == 7 / 8
    # rank 1 sends 4 rows of 2 numbers of 4 bytes, and gets them back; sizes of 1.5 experts
    assert layer.exchange == pytest.approx(2 * 4 * 8 / 8 + 1.5 * 8 / 8)
    one_core = dynamic_layer(rows, [0, 1, 0], COSTS, FREE, cores=1)
    assert one_core.experts == 6 + 3 + 2 and one_core.gate == 2 * layer.gate


def test_a_static_layer_by_hand():
    shape = Shape(experts=4, model_dim=2, hidden_dim=4, layers=1, moe_layers=1, vocabulary=0, fraction=0.5)
    layer = static_layer(6, 2, COSTS, FREE, shape)  # 3 slots
    assert layer.experts == 2 * (4 + 3)  # two experts of 6 rows
    assert layer.gate == pytest.approx(0.5 * 6 + 6 * 4 * 3 * 0.003)


def test_costs_on_another_device():
    """Twice the bandwidth and half the bytes: a quarter; ten times the arithmetic."""
    carried = COSTS.on(Device("there", flops=1000.0, memory=20.0, element=2))
    assert carried.gate_seconds == 0.125 and carried.move_seconds == 0.0625
    assert carried.product_seconds == pytest.approx(0.0002)
    assert float(carried.expert(np.array(1))) == 0.5  # one row: its weights are read
    assert float(carried.expert(np.array(4096))) == pytest.approx(4096 * 4 / 3 / 10)
    assert COSTS.on(HERE) is COSTS


def test_systems_have_sources():
    assert set(systems()) == {"paper", "today"} and all(system.sources for system in systems().values())


@pytest.mark.parametrize("share", [[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.0, 0.0]])
def test_tokens_go_where_they_shall(share):
    rows = whole_rows(np.array(share), tokens=24)
    assert sum(rows) == 48 and max(rows) <= 24
    request = LayerRequest("dynamic", 8, 16, 1.0, [0, 0, 0, 0], [[rows]], 1)
    layer = routed_layer(request, Exchange(RankGroup(dist.HashStore(), 0, 1)))
    calls = []
    layer.observe(calls.append)
    with torch.inference_mode():
        layer(tokens_for(rows, 4, 8, seed=0)[None])
    assert calls[0].load == rows
