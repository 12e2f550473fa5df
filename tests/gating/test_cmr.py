"""Conditional MoE routing: the mix of a dense feed-forward and the experts."""

import math

import pytest
import torch
from cases import PADDINGS, Case

from fairseq_moe_ext.gating.cmr import CMRGate, CMRLayer


def dense(x):
    with torch.no_grad():
        return torch.nn.functional.linear(x, torch.linspace(-1, 1, 36).view(6, 6)) + 0.5


def make_layer(case, drop=0.0):
    torch.manual_seed(case.seed)
    return CMRLayer(case.layer(), dense, case.model_dim, drop).eval()


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_mix_token_by_token(padding):
    case = Case(padding=padding)
    layer = make_layer(case)
    x, mask = case.batch()
    with torch.no_grad():
        output = layer(x, mask)
        experts = layer.moe_layer(x, mask)
    weight, bias = layer.gate.wg.weight.detach()[0].tolist(), layer.gate.wg.bias.item()
    for row in range(x.size(0)):
        for position in range(x.size(1)):
            token = x[row, position]
            share = 1 / (1 + math.exp(-sum(w * v for w, v in zip(weight, token.tolist(), strict=True)) - bias))
            if mask is not None and mask[row, position]:
                share = 0.0
            expected = dense(token) * (1 - share) + experts[row, position] * share
            torch.testing.assert_close(output[row, position], expected, rtol=1e-5, atol=1e-5)


def test_the_gate_drops_in_training_alone():
    gate = CMRGate(4, drop=0.25).eval()
    x = torch.randn(50, 40, 4)
    shares = gate(x)
    assert shares.shape == (50, 40)
    torch.testing.assert_close(shares, gate.wg(x).squeeze(-1).sigmoid())
    torch.manual_seed(0)
    dropped = gate.train()(x)
    gone = dropped == 0
    assert 0.2 < gone.double().mean() < 0.3
    torch.testing.assert_close(dropped[~gone], shares[~gone] / 0.75)


def test_state_dict_has_upstreams_names_and_skips_lang_idx():
    case = Case(num_experts=2)
    layer = make_layer(case)
    state = layer.state_dict()
    assert state["gate.wg.weight"].shape == (1, 6) and state["gate.wg.bias"].shape == (1,)
    assert {"moe_layer.gate.wg.weight", "moe_layer.experts.1.fc2.bias"} <= set(state)
    other = make_layer(case.with_(seed=8))
    given = {**state, "lang_idx": torch.zeros(1, 5)}
    other.load_state_dict(given)
    assert "lang_idx" in given  # the caller's dictionary is left alone
    x, _ = case.batch()
    assert torch.equal(other(x), layer(x))
    parent, nested = torch.nn.ModuleDict({"cmr_layer": other}), {f"cmr_layer.{key}": given[key] for key in given}
    parent.load_state_dict(nested)
    with pytest.raises(RuntimeError, match='Unexpected key.*"cmr_layer.lang_id"'):
        parent.load_state_dict({**nested, "cmr_layer.lang_id": torch.zeros(1)})


def test_gradients_reach_the_gate():
    layer = make_layer(Case()).train()
    layer(Case().batch()[0]).sum().backward()
    assert layer.gate.wg.weight.grad.any()
    assert layer.moe_layer.experts.fc1_weight.grad.any()
