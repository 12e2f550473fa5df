"""What a batch does to its rows, padding to a batch size, serving, and bad arguments."""

import pytest
import reference
import torch
from cases import TOLERANCE, Case, expert_list

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer, Top1Gate
from fairseq_moe_ext.gating.call import LayerCall
from fairseq_moe_ext.gating.routing import Gate
from fairseq_moe_ext.gating.slots import dispatcher_for


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("use_fp32", [True, False])
def test_dynamic_rows_do_not_depend_on_their_batch(num_choices, use_fp32):
    """A row alone, among others, and among others in another order."""
    case = Case(rows=8, positions=16, num_experts=7, num_choices=num_choices, skew=1.0, use_fp32=use_fp32)
    layer = case.layer("dynamic")
    x, _ = case.batch()
    together = layer(x)
    for row in range(8):
        torch.testing.assert_close(layer(x[row : row + 1]), together[row : row + 1], rtol=0, atol=1e-6)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[order]), together[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_dynamic_tokens_do_not_depend_on_later_ones(num_choices):
    case = Case(rows=4, positions=16, num_choices=num_choices, skew=1.0)
    layer = case.layer("dynamic")
    x, _ = case.batch()
    changed = x.clone()
    changed[:, 8:, 1:] = torch.randn(4, 8, case.model_dim - 1, generator=torch.Generator().manual_seed(9)) * 3
    torch.testing.assert_close(layer(changed)[:, :8], layer(x)[:, :8], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x[:, :8]), layer(x)[:, :8], rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_prioritized", [False, True])
def test_static_rows_depend_on_each_other(batch_prioritized):
    """Under a finite capacity a row's output changes with its batch-mates: why dynamic gating is wanted."""
    case = Case(rows=8, positions=16, skew=1.0)
    layer = case.layer("static", capacity_fraction=0.1, batch_prioritized=batch_prioritized)
    x, _ = case.batch()
    together = layer(x)
    differences = [(layer(x[row : row + 1]) - together[row : row + 1]).abs().max().item() for row in range(8)]
    assert max(differences) > 0.1


def test_static_tokens_depend_on_the_future():
    """Second choices queue after the first choices of the whole batch, those of later tokens included."""
    case = Case(rows=4, positions=16, skew=1.0)
    layer = case.layer("static", capacity_fraction=0.25)
    x, _ = case.batch()
    changed = x.clone()
    changed[:, 8:, 1:] = torch.randn(4, 8, case.model_dim - 1, generator=torch.Generator().manual_seed(9)) * 3
    assert (layer(changed)[:1, :8] - layer(x)[:1, :8]).abs().max() > 0.1


@pytest.mark.parametrize("training, fraction", [(True, 0.25), (False, 0.25), (False, -1.0)])
@pytest.mark.parametrize("masked", [True, False])
def test_static_batches_are_padded_to_the_batch_size(training, fraction, masked):
    """Missing rows count for the capacity and for the gate loss, but never run."""
    case = Case(rows=3, positions=6, skew=40.0, padding="left" if masked else "none")
    sizes = {"batch_size": 8} if training else {"batch_size_valid": 8}
    layer = case.layer("static", capacity_fraction=fraction, count_padding=not masked, **sizes).train(training)
    calls = []
    layer.observe(calls.append)
    x, mask = case.batch()
    with torch.no_grad():
        output, found = layer(x, mask), layer.gate_loss().item()

    padded = torch.cat((x, torch.zeros(5, 6, case.model_dim)))
    padding_mask = torch.ones(8, 6, dtype=torch.bool)
    padding_mask[:3] = mask if masked else False
    expected = reference.moe_layer(
        padded,
        layer.gate.wg.weight.detach(),
        expert_list(layer),
        padding_mask=padding_mask,
        capacity=reference.capacity_of(48, case.num_experts, 2, fraction, training),
    )
    assert output.shape == x.shape
    torch.testing.assert_close(output, expected.output[:3], **TOLERANCE[torch.float32])
    assert calls[0].load == expected.load(case.num_experts)
    probabilities = torch.softmax(padded.flatten(0, 1) @ layer.gate.wg.weight.detach().T, dim=1)
    loss = reference.gate_loss(probabilities, [e[0] for e in expected.expert_ids], padding_mask.flatten().tolist())
    assert found == pytest.approx(loss, rel=1e-4)


def test_training_and_validation_have_batch_sizes_of_their_own():
    case = Case(rows=3, positions=5, skew=40.0, num_choices=1)
    layer = case.layer("static", capacity_fraction=0.2, batch_size=5, batch_size_valid=9)
    calls = []
    layer.observe(calls.append)
    x, _ = case.batch()
    layer(x)
    layer.train()(x)
    assert [max(call.load) for call in calls] == [9, 5]  # ceil(0.2 * 45), ceil(25 / 5)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_larger_than_the_batch_size(training):
    case = Case(rows=3, positions=5)
    sizes = {"batch_size": 2, "batch_size_valid": 9} if training else {"batch_size": 9, "batch_size_valid": 2}
    layer = case.layer("static", **sizes).train(training)
    with pytest.raises(ValueError, match=r"batch-size must be at least the rows of every batch.*: 2 < 3"):
        layer(case.batch()[0])


def test_served_batches_are_never_padded():
    case = Case(rows=3, positions=5, skew=40.0, num_choices=1)
    layer = case.layer("static", capacity_fraction=0.2, batch_size=5, batch_size_valid=2)
    calls = []
    layer.prepare_for_serving(seed=1, observer=calls.append)
    output = layer(case.batch()[0])
    assert output.shape == (3, 5, case.model_dim)
    assert max(calls[0].load) == 3


def test_dynamic_gating_pads_nothing():
    case = Case(rows=3, positions=5)
    x, _ = case.batch()
    layer = case.layer("dynamic", batch_size=2, batch_size_valid=8)
    torch.testing.assert_close(layer(x), case.layer("dynamic")(x), rtol=0, atol=0)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_serving_keeps_no_statistics(gating):
    case = Case()
    layer = case.layer(gating)
    with pytest.raises(RuntimeError, match="a gate loss needs a call of the layer before it"):
        layer.gate_loss()
    layer(case.batch()[0])
    assert layer.gate_loss().isfinite()
    layer.prepare_for_serving(seed=1)
    for question in (layer.gate_loss, layer.metadata):
        with pytest.raises(RuntimeError, match="a layer that is not serving"):
            question()
    layer(case.batch()[0])
    with pytest.raises(RuntimeError, match="a layer that is not serving"):
        layer.gate_loss()


@pytest.mark.parametrize("policy", ["sampling", "random"])
@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_serving_seeds_the_random_policies(policy, gating):
    case = Case(rows=6, positions=8, num_experts=8)
    x, _ = case.batch()

    def served(seed):
        layer = case.layer(gating, policy, capacity_fraction=1.0)
        layer.prepare_for_serving(seed)
        torch.rand(3)  # the global stream has no say
        return layer(x)

    torch.testing.assert_close(served(5), served(5), rtol=0, atol=0)
    assert not torch.allclose(served(5), served(6))


@pytest.mark.parametrize("gating, parts", [
    ("dynamic", {"gate", "dispatch", "experts", "combine"}),
    ("static", {"gate", "capacity", "dispatch", "experts", "combine"}),
])
def test_the_observer_hears_of_every_call(gating, parts):
    case = Case()
    layer = case.layer(gating)
    calls: list[LayerCall] = []
    layer.prepare_for_serving(seed=1, observer=calls.append)
    x, _ = case.batch()
    layer(x)
    layer(x[:1])
    assert [call.assignments for call in calls] == [42, 14]
    for call in calls:
        assert set(call.seconds) == parts and all(seconds >= 0 for seconds in call.seconds.values())
        assert sum(call.load) + call.dropped == call.assignments


def test_bad_arguments_name_argument_rule_and_value():
    case = Case()
    gate, experts = case.gate(), ResidentExperts(5, 6, 5)
    with pytest.raises(ValueError, match="^gating must be one of dynamic, static, got 'tutel'$"):
        dispatcher_for("tutel")
    for value in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"^output_masking \(moe_eom\) must be in \[0, 1\), got {value}$"):
            MOELayer(gate, experts, output_masking=value)


def test_a_gate_must_say_how_experts_are_chosen():
    class Silent(Gate):
        num_choices = 1

    layer = MOELayer(Silent(6, 5), ResidentExperts(5, 6, 5))
    with pytest.raises(TypeError, match="Silent does not say how experts are chosen"):
        layer(torch.zeros(1, 1, 6))


def test_state_dict_of_the_layer_has_upstreams_names():
    layer = MOELayer(Top1Gate(6, 3), ResidentExperts(3, 6, 5))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    expected = {"gate.wg.weight": (3, 6)}
    for expert in range(3):
        expected |= {
            f"experts.{expert}.fc1.weight": (5, 6),
            f"experts.{expert}.fc1.bias": (5,),
            f"experts.{expert}.fc2.weight": (6, 5),
            f"experts.{expert}.fc2.bias": (6,),
        }
    assert shapes == expected
