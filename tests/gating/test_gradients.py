"""Both gatings can be trained through: exact gradients on a tiny layer in float64."""

import itertools

import pytest
import torch
from buffer_makers import buffered_twin, resident_experts
from cases import Case
from torch.func import functional_call

from fairseq_moe_ext.experts.parts import EXPERT_KEYS

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


PARAMETERS = ("gate.wg.weight", *(f"experts.{name}" for name in EXPERT_KEYS))
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(PARAMETERS, size)]


def gradients(layer, x, trained, x_too):
    """Of a sum over the output, by name, where just `trained` parameters and perhaps x ask for some."""
    x = x.clone().requires_grad_(x_too)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.grad = None
    scale = torch.linspace(-1, 1, x.numel()).view_as(x)
    (layer(x) * scale).sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if name in trained}
    return {**found, "x": x.grad} if x_too else found


@pytest.mark.parametrize("gating, kernel, training", [
    ("dynamic", "auto", True), ("dynamic", "auto", False), ("dynamic", "grouped-mm", False),
    ("dynamic", "triton", False), ("static", "auto", True), ("static", "auto", False),
])
@pytest.mark.parametrize("tokens", [24, 130])  # with more rows per expert another product takes over
def test_whatever_is_frozen_the_rest_has_its_gradients(gating, kernel, training, tokens):
    case = Case(rows=2, positions=tokens // 2, model_dim=8, hidden_dim=12, skew=1.0)
    layer, (x, _) = case.layer(gating, activation=torch.tanh), case.batch()
    layer.train(training)
    layer.experts.use_kernel(kernel)
    expected = gradients(layer, x, PARAMETERS, x_too=True)
    assert all(gradient.any() for gradient in expected.values())
    for trained in SUBSETS:
        for x_too in (False, True):
            for name, gradient in gradients(layer, x, trained, x_too).items():
                assert gradient is not None, (trained, name)
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    found = gradients(layer, x, (), x_too=True)["x"]
    torch.testing.assert_close(found, expected["x"], rtol=1e-4, atol=1e-5)


def test_experts_in_a_buffer_refuse_what_they_cannot_give():
    """The way around them, by the gate's weights, has gradients: a sum that lacked theirs would say nothing."""
    buffered = buffered_twin(resident_experts(4), 2)
    rows = torch.randn(4, 6)
    assert not buffered(rows, [1, 1, 1, 1]).requires_grad
    outputs = buffered(rows.requires_grad_(), [1, 1, 1, 1])
    with pytest.raises(RuntimeError, match="experts in a buffer have no gradients: serve them under torch.no_grad"):
        outputs.sum().backward()


def test_an_expert_without_tokens_has_a_zero_gradient_and_a_batch_without_tokens_none():
    case = Case(skew=400.0, num_choices=1)
    layer = case.layer("dynamic").train()
    layer(case.batch()[0]).sum().backward()
    rows = layer.experts.fc1_weight.grad.flatten(1).any(dim=1)
    assert rows.sum() == 1
    x = torch.zeros(0, 4, case.model_dim, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
