"""Static gating by indices, against static gating by the dense mask."""

import pytest
import torch

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer, Top1Gate, Top2Gate
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for
from fairseq_moe_ext.gating.sparse_static import slot_rows, sparse_dispatch
from fairseq_moe_ext.gating.static import assign_slots, dense_combine_weights, static_dispatch

TOKENS, EXPERTS, MODEL_DIM = 30, 5, 8


def layer_of(gate_class, **options):
    """A layer whose gate prefers some experts, and tokens (6, 5, D) with padding at the ends."""
    torch.manual_seed(0)
    gate = gate_class(MODEL_DIM, EXPERTS, **({"second_expert_policy": "all"} if gate_class is Top2Gate else {}))
    gate.wg.weight.data *= torch.linspace(0.5, 3, EXPERTS).unsqueeze(1)
    experts = ResidentExperts(EXPERTS, MODEL_DIM, 12)
    layer = MOELayer(gate, experts, dispatcher_for("static", StaticOptions(**options))).eval()
    x, padding = torch.randn(6, 5, MODEL_DIM), torch.zeros(6, 5, dtype=torch.bool)
    padding[1, 3:] = padding[4, 1:] = True
    return layer, x, padding


@pytest.mark.parametrize("gate_class", [Top1Gate, Top2Gate])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("options", [{}, {"count_padding": False}, {"batch_prioritized": True}], ids=str)
def test_the_layer_is_the_dense_masks(gate_class, fraction, options):
    layer, x, padding = layer_of(gate_class, capacity_fraction=fraction, **options)
    by_indices = dispatcher_for("static", StaticOptions(fraction, sparse=True, **options))
    sparse = MOELayer(layer.gate, layer.experts, by_indices).eval()
    calls = []
    for each in (layer, sparse):
        each.prepare_for_serving(0, calls.append)
    torch.testing.assert_close(sparse(x, padding), layer(x, padding))
    assert calls[0].load == calls[1].load and calls[0].dropped == calls[1].dropped
    assert fraction < 1 or len(set(calls[0].load)) > 1  # uneven
    assert (calls[0].dropped > 0) == (fraction < 1)


@pytest.mark.parametrize("capacity", [1, 4, TOKENS])
def test_the_rows_are_the_dense_masks(capacity):
    layer, x, padding = layer_of(Top2Gate)
    tokens = x.view(TOKENS, MODEL_DIM)
    routing = layer.gate(tokens, padding.view(-1))
    slots = assign_slots(routing)
    routing = routing.keep_only(slots < capacity)
    weights = layer.gate.combine_weights(routing).to(tokens.dtype)
    expected = static_dispatch(tokens, dense_combine_weights(routing, slots, weights, capacity))
    assert torch.equal(sparse_dispatch(tokens, routing, slot_rows(routing, slots, capacity), capacity), expected)


def test_no_tokens_need_no_slots():
    layer, x, _ = layer_of(Top2Gate, sparse=True)
    assert layer(x[:0]).shape == (0, 5, MODEL_DIM)
