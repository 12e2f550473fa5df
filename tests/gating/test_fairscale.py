"""An independent implementation: fairscale's MOELayer and Top2Gate (GShard), where its rules and ours coincide.

fairscale's top-2 gate has training's capacity, 2 T / E with T a multiple of E, normalises after dropping, knows no
padding and adds Gumbel noise, which is set to zero here: the policy `all`. Its loss lacks the factor E * E.
"""

import pytest
import torch
from cases import Case, expert_list

dist = pytest.importorskip("torch.distributed")
top2gate = pytest.importorskip("fairscale.nn.moe.top2gate")
moe_layer = pytest.importorskip("fairscale.nn.moe.moe_layer")


class Expert(torch.nn.Module):
    """fairscale's experts take any shape that ends in the model dim."""

    def __init__(self, weights):
        super().__init__()
        self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias = (
            torch.nn.Parameter(weight.clone())
            for weight in (weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, weights.fc2_bias)
        )

    def forward(self, rows):
        return torch.relu(rows @ self.fc1_weight.T + self.fc1_bias) @ self.fc2_weight.T + self.fc2_bias


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def without_noise(monkeypatch):
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device))


def fairscales(layer, group):
    """fairscale's layer with the same weights."""
    wg = layer.gate.wg.weight.detach()
    gate = top2gate.Top2Gate(wg.size(1), wg.size(0))
    gate.wg.weight = torch.nn.Parameter(wg.clone())
    return moe_layer.MOELayer(gate, torch.nn.ModuleList(map(Expert, expert_list(layer))), group)


@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("num_experts, positions", [(4, 8), (8, 16), (6, 5), (3, 1)])
@pytest.mark.parametrize("training, fraction", [(True, 0.25), (False, -1.0)])
def test_output_loss_and_gradients_agree(
    process_group, without_noise, num_experts, positions, skew, training, fraction
):
    case = Case(rows=num_experts, positions=positions, num_experts=num_experts, skew=skew, seed=num_experts)
    layer = case.layer("static", capacity_fraction=fraction).train(training)
    other = fairscales(layer, process_group)
    x, _ = case.batch()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    output, expected = layer(inputs[0]), other(inputs[1])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.gate_loss(), other.l_aux * num_experts**2)

    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for result, loss in ((output, layer.gate_loss()), (expected, other.l_aux * num_experts**2)):
        ((result * direction).sum() + loss).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.gate.wg.weight.grad, other.gate.wg.weight.grad, rtol=1e-3, atol=1e-4)
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        theirs = torch.stack([getattr(expert, name).grad for expert in other.experts])
        torch.testing.assert_close(getattr(layer.experts, name).grad, theirs, rtol=1e-3, atol=1e-4)


def test_something_was_dropped():
    """The comparison above covers a full expert."""
    case = Case(rows=4, positions=8, num_experts=4, skew=40.0, seed=4)
    calls = []
    layer = case.layer("static", capacity_fraction=-1.0)
    layer.observe(calls.append)
    layer(case.batch()[0])
    assert calls[0].dropped == 32 and sorted(calls[0].load) == [0, 0, 16, 16]


@pytest.mark.parametrize("num_experts", [4, 6])
def test_ample_capacity_is_dynamic_gating(process_group, without_noise, num_experts):
    """Even routing fills every expert to the slot: with nothing dropped fairscale's output is the dynamic one."""
    case = Case(rows=num_experts, positions=1, model_dim=num_experts, num_experts=num_experts)
    layer = case.layer("dynamic")
    with torch.no_grad():
        # token t prefers expert t, then t + 1
        layer.gate.wg.weight.copy_(torch.eye(num_experts) * 3 + torch.eye(num_experts).roll(1, dims=0))
    other = fairscales(layer, process_group)
    x = torch.eye(num_experts).unsqueeze(1)
    calls = []
    layer.observe(calls.append)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-4, atol=1e-5)
    assert calls[0].load == [2] * num_experts
