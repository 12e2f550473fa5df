"""A layer under `torch.autocast` (fairseq's --amp): as a naive twin of dense layers under it, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from buffer_makers import buffered_twin
from cases import Case

from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.cmr import CMRLayer
from fairseq_moe_ext.kernels.cpu_kernel import VARIABLE

BFLOAT16 = torch.bfloat16


def autocast(enabled: bool = True):
    return torch.autocast("cpu", BFLOAT16, enabled=enabled)


def twin(layer, x, mask, routing):
    """The experts as dense layers, one after the other, as `routing` has it; in whatever autocast makes of F.linear."""
    tokens = x.reshape(-1, x.size(2))
    weights = layer.gate.combine_weights(routing)
    result = 0
    for expert, parameters in enumerate(zip(*layer.experts.parameters(), strict=True)):
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
        outputs = F.linear(layer.experts.activation(F.linear(tokens, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        share = torch.where((routing.expert_ids == expert) & routing.kept, weights, 0).sum(dim=1, keepdim=True)
        result = result + outputs * share.to(outputs.dtype)
    return result.view_as(x)


def gate_of(layer, x, mask):
    return layer.gate(x.reshape(-1, x.size(2)), None if mask is None else mask.reshape(-1))


def gradients(layer, x, output) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x.grad = None
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward(retain_graph=True)
    return {"x": x.grad.clone(), **{name: value.grad.clone() for name, value in layer.named_parameters()}}


def assert_as_close(found, twins, exact):
    """No further from float32 than twice the twin, which rounds as often."""
    error, allowed = (found.float() - exact).norm(), (twins.float() - exact).norm()
    assert 0 < allowed < 0.05 * exact.norm()  # the twin is of any use
    assert error <= 2 * allowed


CASES = [
    pytest.param(gating, choices, fp32, id=f"{gating} top-{choices}{' fp32' if fp32 else ''}")
    for gating in ("dynamic", "static", "sparse")
    for choices in (1, 2)
    for fp32 in (True, False)
]


def layer_and_batch(gating, choices, fp32, rows=4):
    """No token is dropped, and the choice between experts is far from any rounding."""
    case = Case(rows=rows, positions=9, model_dim=16, hidden_dim=24, num_experts=4, num_choices=choices,
                skew=1.0, padding="left", use_fp32=fp32, normalize_before_dropping=True)
    static = {"sparse": gating == "sparse", "capacity_fraction": 1.0, "count_padding": False}
    layer = case.layer("dynamic" if gating == "dynamic" else "static", activation=torch.tanh, **static)
    return layer, *case.batch()


@pytest.mark.parametrize("gating, choices, fp32", CASES)
def test_training_under_autocast_is_as_close_as_dense_layers(gating, choices, fp32):
    layer, x, mask = layer_and_batch(gating, choices, fp32)
    x.requires_grad_()
    with autocast():
        output = layer(x, mask)
        routing = gate_of(layer, x, mask)
        wanted = twin(layer, x, mask, routing)
    loss = layer.gate_loss()
    assert output.dtype == wanted.dtype == BFLOAT16
    assert routing.weights.dtype == loss.dtype == (torch.float32 if fp32 else routing.weights.dtype)
    plain = gate_of(layer, x, mask)
    exact = twin(layer, x, mask, plain if fp32 else routing)
    if fp32:
        assert torch.equal(routing.expert_ids, plain.expert_ids) and torch.equal(routing.weights, plain.weights)
    assert_as_close(output, wanted, exact)
    found, twins, exact = (gradients(layer, x, each) for each in (output, wanted, exact))
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert_as_close(found[name], twins[name], value)


@pytest.mark.parametrize("gating, choices, fp32", CASES)
@pytest.mark.parametrize("kernel", ["auto", "plain", "off"])
@pytest.mark.parametrize("rows", [4, 60])  # many rows per expert go to another product
def test_evaluation_under_autocast_has_its_dtype_too(gating, choices, fp32, kernel, rows, monkeypatch):
    monkeypatch.setenv(VARIABLE, kernel)
    layer, x, mask = layer_and_batch(gating, choices, fp32, rows)
    with torch.no_grad():
        with autocast():
            output, routing = layer(x, mask), gate_of(layer, x, mask)
            wanted = twin(layer, x, mask, routing)
        assert output.dtype == wanted.dtype == BFLOAT16
        exact = twin(layer, x, mask, routing)
        assert_as_close(output, wanted, exact)
        assert layer(x, mask).dtype == torch.float32  # autocast leaves nothing behind


@pytest.mark.grouped_mm
def test_grouped_products_under_autocast():
    layer, x, mask = layer_and_batch("dynamic", 2, True)
    with torch.no_grad(), autocast():
        by_loop = layer(x, mask)
        layer.experts.use_kernel("grouped-mm")
        assert layer(x, mask).dtype == BFLOAT16
        torch.testing.assert_close(layer(x, mask), by_loop, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_a_buffer_computes_in_its_own_dtype(gating):
    case = Case(padding="left", use_fp32=True)
    layer, (x, mask) = case.layer(gating, activation=torch.tanh, count_padding=False), case.batch()
    buffered = MOELayer(layer.gate, buffered_twin(layer.experts, 2), layer.dispatcher).eval()
    with torch.no_grad():
        wanted = layer(x, mask)
        with autocast():
            assert torch.equal(buffered(x, mask), wanted.to(BFLOAT16))


def test_conditional_routing_mixes_under_autocast():
    layer, x, mask = layer_and_batch("dynamic", 2, True)
    dense = torch.nn.Linear(x.size(2), x.size(2))
    mixed = CMRLayer(layer, dense, x.size(2))
    with autocast():
        output = mixed(x, mask)
    output.float().sum().backward()
    assert output.dtype == BFLOAT16
    torch.testing.assert_close(output.float(), mixed(x, mask), rtol=5e-2, atol=5e-2)


def test_float64_is_left_alone():
    layer, x, mask = layer_and_batch("dynamic", 2, True)
    layer, x = layer.double(), x.double()
    with autocast():
        assert layer(x, mask).dtype == torch.float64
