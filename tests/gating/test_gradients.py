"""Both gatings can be trained through: exact gradients on a tiny layer in float64."""

import pytest
import torch
from cases import Case
from torch.func import functional_call

CASES = [
    pytest.param("dynamic", 1, False, id="dynamic top-1"),
    pytest.param("dynamic", 2, False, id="dynamic top-2"),
    pytest.param("dynamic", 2, True, id="dynamic top-2 normalised before dropping"),
    pytest.param("static", 1, False, id="static top-1"),
    pytest.param("static", 2, False, id="static top-2"),
    pytest.param("static", 2, True, id="static top-2 normalised before dropping"),
]


@pytest.mark.parametrize("gating, num_choices, normalize", CASES)
def test_gradients_of_input_gate_and_experts(gating, num_choices, normalize):
    case = Case(rows=2, positions=4, model_dim=3, hidden_dim=2, num_experts=3, num_choices=num_choices, skew=0.5,
                padding="left", dtype=torch.float64, normalize_before_dropping=normalize)
    layer = case.layer(gating, activation=torch.tanh, capacity_fraction=0.4, count_padding=False)
    x, mask = case.batch()
    parameters = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}

    def output(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x, mask))

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *parameters.values()))


@pytest.mark.parametrize("gating, num_choices, normalize", CASES)
def test_gradients_of_the_gate_loss(gating, num_choices, normalize):
    case = Case(num_choices=num_choices, normalize_before_dropping=normalize, dtype=torch.float64, skew=1.0)
    layer = case.layer(gating).train()
    x, _ = case.batch()

    def loss(wg):
        functional_call(layer, {"gate.wg.weight": wg}, (x,))
        return layer.gate_loss()

    wg = layer.gate.wg.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (wg,))
    layer(x)
    layer.gate_loss().backward()
    assert layer.gate.wg.weight.grad.abs().max() > 1e-3


def test_an_expert_without_tokens_has_a_zero_gradient_and_a_batch_without_tokens_none():
    case = Case(skew=400.0, num_choices=1)
    layer = case.layer("dynamic").train()
    layer(case.batch()[0]).sum().backward()
    rows = layer.experts.fc1_weight.grad.flatten(1).any(dim=1)
    assert rows.sum() == 1
    x = torch.zeros(0, 4, case.model_dim, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
