"""Load statistics against naive twins and by hand."""

import numpy as np
import pytest

from fairseq_moe_ext.balancing.load import (
    balance,
    expert_sparsity,
    hot_experts,
    layer_load,
    rank_shares,
    shares,
    temporal_locality,
)
from fairseq_moe_ext.trace import TraceRecorder

LAYERS = ("decoder.layers.1.moe_layer", "decoder.layers.3.moe_layer")


def recorded():
    """Batch 0 has two steps, batch 4 has one."""
    recorder = TraceRecorder()
    for batch, load in ((0, [200, 0, 1]), (0, [200, 3, 0]), (4, [0, 0, 5])):
        recorder.begin_step("decode", batch)
        recorder.add(LAYERS[0], load)
        recorder.add(LAYERS[1], load[::-1])
    return recorder.trace()["decode"]


@pytest.mark.parametrize("objective, per_step, expected", [
    ("tokens", False, [[400, 3, 1], [0, 0, 5]]),  # beyond what the trace's uint8 holds
    ("tokens", True, [[200, 0, 1], [200, 3, 0], [0, 0, 5]]),
    ("active", False, [[2, 1, 1], [0, 0, 1]]),
    ("active", True, [[1, 0, 1], [1, 1, 0], [0, 0, 1]]),
])
def test_load_of_a_layer(objective, per_step, expected):
    assert layer_load(recorded(), LAYERS[0], objective, per_step).tolist() == expected
    assert layer_load(recorded(), LAYERS[1], objective, per_step)[:, ::-1].tolist() == expected


def test_a_layer_that_is_not_there_and_an_unknown_objective():
    with pytest.raises(ValueError, match="must hold the layer encoder.layers.1.moe_layer; it holds decoder.layers.1"):
        layer_load(recorded(), "encoder.layers.1.moe_layer")
    with pytest.raises(ValueError, match="^objective must be one of tokens, active, got 'bytes'$"):
        layer_load(recorded(), LAYERS[0], "bytes")


def naive_max_loads(loads, layer, world_size):
    """(Max Load, Avg Max Load) as the paper words them, batch by batch."""
    largest = []
    for batch in loads.tolist():
        if sum(batch) == 0:
            continue
        devices = [0.0] * world_size
        for expert, ranks in enumerate(layer):
            for rank in ranks:
                devices[rank] += batch[expert] / len(ranks)
        largest.append(max(devices) / sum(batch))
    return max(largest), sum(largest) / len(largest)


def test_max_load_and_avg_max_load():
    random = np.random.default_rng(0)
    loads = random.integers(0, 9, size=(20, 6))
    loads[7] = 0
    for layer in (((0,), (1,), (2,), (0,), (1,), (2,)), ((0, 1, 2), (0,), (1,), (2, 0), (1,), (2,))):
        found = balance(rank_shares(loads, layer, 3))
        assert (found.max_load, found.avg_max_load) == pytest.approx(naive_max_loads(loads, layer, 3))


def test_metrics_of_a_trace_without_tokens():
    nothing = np.zeros((3, 4), dtype=np.int64)
    assert shares(nothing).shape == (0, 4)
    found = balance(rank_shares(nothing, ((0,), (0,), (1,), (1,)), 2))
    assert (found.max_load, found.avg_max_load) == (0, 0)
    assert np.isnan(temporal_locality(nothing)) and expert_sparsity(nothing) == 1


def test_sparsity_hot_experts_and_locality():
    loads = np.array([[4, 0, 0, 4], [9, 0, 1, 0], [0, 0, 0, 0], [1, 0, 3, 0]])
    assert expert_sparsity(loads) == 10 / 16
    # shares 0.5 0 0 0.5; 0.9 0 0.1 0; 0.25 0 0.75 0: one batch counts as much as another, whatever its size
    assert hot_experts(loads, 3).tolist() == [0, 2, 3]
    # of batch 1's two one was active before; of batch 3's two none; batch 2 has none
    assert temporal_locality(loads) == 0.25
