"""The whole layer, dynamic and static, held against the token-by-token twin."""

import math

import pytest
import reference
import torch
from cases import PADDINGS, TOLERANCE, Case, examples, expert_list, layer_cases
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for
from fairseq_moe_ext.gating.static import assign_slots

FRACTIONS = (-1.0, 0.0, 0.05, 0.25, 0.5, 1.0, 2.0)


def twin(case, layer, x, mask, **options):
    return reference.moe_layer(
        x,
        layer.gate.wg.weight.detach(),
        expert_list(layer),
        num_choices=case.num_choices,
        padding_mask=mask,
        use_fp32=case.use_fp32,
        normalize_before_dropping=case.normalize_before_dropping,
        **options,
    )


def run(layer, x, mask):
    """Output and LayerCall of one call."""
    calls = []
    layer.observe(calls.append)
    with torch.no_grad():
        output = layer(x, mask)
    assert len(calls) == 1
    return output, calls[0]


def check_routing(case, layer, x, mask, expected, capacity=None, batch_prioritized=False):
    """Experts, slots and kept flags are the twin's exactly, weights closely."""
    with torch.no_grad():
        routing = layer.gate(x.reshape(-1, x.size(2)), None if mask is None else mask.reshape(-1))
        assert routing.expert_ids.tolist() == expected.expert_ids
        assert routing.kept.tolist() == expected.wanted
        if capacity is not None:
            slots = assign_slots(routing, batch_prioritized)
            assert slots.masked_fill(~routing.kept, reference.NO_SLOT).tolist() == expected.slots
            routing = routing.keep_only(slots < capacity)
            assert routing.kept.tolist() == expected.kept
        weights = layer.gate.combine_weights(routing)
    shape = (len(expected.weights), case.num_choices)
    wanted = torch.tensor(expected.weights, dtype=weights.dtype).view(shape)
    torch.testing.assert_close(weights, wanted, **TOLERANCE[weights.dtype])


def check_dynamic(case, output_masking=0.0):
    layer = case.layer("dynamic", output_masking=output_masking)
    x, mask = case.batch()
    output, call = run(layer, x, mask)
    expected = twin(case, layer, x, mask, output_masking=output_masking)
    assert output.shape == x.shape and output.dtype == x.dtype
    torch.testing.assert_close(output, expected.output, **TOLERANCE[case.dtype])
    check_routing(case, layer, x, mask, expected)
    assert call.load == expected.load(case.num_experts)
    assert (call.assignments, call.dropped) == (sum(call.load), 0)


def check_static(case, fraction, training=False, batch_prioritized=False, count_padding=False):
    layer = case.layer(
        "static", capacity_fraction=fraction, batch_prioritized=batch_prioritized, count_padding=count_padding
    ).train(training)
    x, mask = case.batch()
    output, call = run(layer, x, mask)
    if count_padding:
        mask = None
    capacity = reference.capacity_of(
        x.size(0) * x.size(1), case.num_experts, case.num_choices, fraction, training
    )
    by_priority = batch_prioritized and case.num_choices == 2  # upstream's top-1 gate knows no priority
    expected = twin(case, layer, x, mask, capacity=capacity, batch_prioritized=by_priority)
    assert output.shape == x.shape and output.dtype == x.dtype
    torch.testing.assert_close(output, expected.output, **TOLERANCE[case.dtype])
    check_routing(case, layer, x, mask, expected, capacity, by_priority)
    assert call.load == expected.load(case.num_experts)
    assert max(call.load) <= capacity
    assert call.assignments == sum(map(sum, expected.wanted))
    assert call.dropped == call.assignments - sum(call.load)
    return call


@examples(60)
@given(layer_cases(), st.sampled_from((0.0, 0.2)))
def test_dynamic_is_the_twin_without_capacity(case, output_masking):
    check_dynamic(case, output_masking)


@examples(60)
@given(
    layer_cases(min_tokens=1),
    st.sampled_from(FRACTIONS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_static_is_the_twin_with_capacity(case, fraction, training, batch_prioritized, count_padding):
    check_static(case, fraction, training, batch_prioritized, count_padding)


@examples(30)
@given(layer_cases(dtypes=(torch.bfloat16, torch.float16)))
def test_dynamic_in_half_precision(case):
    check_dynamic(case)


@examples(30)
@given(layer_cases(min_tokens=1, dtypes=(torch.bfloat16, torch.float16)), st.sampled_from(FRACTIONS), st.booleans())
def test_static_in_half_precision(case, fraction, batch_prioritized):
    check_static(case, fraction, batch_prioritized=batch_prioritized)


@examples(30)
@given(layer_cases(min_tokens=1), st.booleans())
def test_static_at_fraction_one_is_dynamic(case, batch_prioritized):
    x, mask = case.batch()
    static = case.layer("static", capacity_fraction=1.0, batch_prioritized=batch_prioritized, count_padding=False)
    output, call = run(static, x, mask)
    expected, dynamic_call = run(case.layer("dynamic"), x, mask)
    assert call.dropped == 0 and call.load == dynamic_call.load
    torch.testing.assert_close(output, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_token_at_all(num_choices, shape):
    case = Case(rows=shape[0], positions=shape[1], num_choices=num_choices)
    output, call = run(case.layer("dynamic"), *case.batch())
    assert output.shape == (*shape, case.model_dim)
    assert call.load == [0] * case.num_experts


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("num_experts", [3, 7])
def test_all_tokens_on_one_expert(num_choices, num_experts):
    """The others have no token; static gating keeps no more than the capacity of it."""
    case = Case(rows=4, positions=5, num_experts=num_experts, num_choices=num_choices, skew=400.0, use_fp32=True)
    _, call = run(case.layer("dynamic"), *case.batch())
    assert sorted(call.load) == [0] * (num_experts - num_choices) + [20] * num_choices
    check_dynamic(case)
    call = check_static(case, 0.25)
    assert sorted(call.load)[-num_choices:] == [5] * num_choices and call.dropped == 15 * num_choices


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_only_padding_comes_out_as_zero(gating, num_choices):
    case = Case(num_choices=num_choices, padding="all")
    output, call = run(case.layer(gating, count_padding=False), *case.batch())
    assert torch.equal(output, torch.zeros_like(output))
    assert call.load == [0] * case.num_experts and call.assignments == 0


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_padding_comes_out_as_zero_and_takes_no_slot(gating, padding):
    """What stands in padded positions changes nothing else, NaN in dynamic gating included."""
    case = Case(rows=4, positions=6, padding=padding)
    layer = case.layer(gating, capacity_fraction=0.25, count_padding=False)
    x, mask = case.batch()
    mask = torch.zeros(x.shape[:2], dtype=torch.bool) if mask is None else mask
    output, _ = run(layer, x, mask)
    assert not output[mask].any()
    filler = math.nan if gating == "dynamic" else 7.0
    other, _ = run(layer, x.masked_fill(mask.unsqueeze(2), filler), mask)
    torch.testing.assert_close(other[~mask], output[~mask])
    assert not other[mask].any()


def test_static_gating_that_counts_padding_routes_it():
    """Without upstream's `use_moe_pad_mask` padding takes slots from the tokens after it."""
    case = Case(rows=4, positions=6, padding="left", skew=40.0)
    x, mask = case.batch()
    x[mask] = 0.1
    x[..., 0] = 1.0
    counted, call = run(case.layer("static", capacity_fraction=0.5, count_padding=True), x, mask)
    spared, spared_call = run(case.layer("static", capacity_fraction=0.5, count_padding=False), x, mask)
    assert call.assignments == 2 * 24 and spared_call.assignments == 2 * int((~mask).sum())
    assert counted[mask].any() and not torch.allclose(counted[~mask], spared[~mask])


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_output_masking_scales_the_experts_output(gating):
    case = Case()
    x, _ = case.batch()
    plain, _ = run(case.layer(gating, capacity_fraction=0.5), x, None)
    masked, _ = run(case.layer(gating, output_masking=0.2, capacity_fraction=0.5), x, None)
    torch.testing.assert_close(masked, plain * 0.8)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_output_masking_in_training_zeroes_whole_rows(gating):
    case = Case(rows=40, positions=50, num_choices=1)
    x, _ = case.batch()
    layer = case.layer(gating, output_masking=0.2, capacity_fraction=1.0)
    plain, _ = run(case.layer("dynamic"), x, None)
    # capacity in training is finite: take what survives it
    reached, _ = run(case.layer(gating).train(), x, None)
    torch.manual_seed(0)
    output, _ = run(layer.train(), x, None)
    output, plain, reached = output.flatten(0, 1), plain.flatten(0, 1), reached.flatten(0, 1)
    alive = output.any(dim=1)
    torch.testing.assert_close(output[alive], plain[alive])
    share = 1 - alive.sum().item() / reached.any(dim=1).sum().item()
    assert 0.16 < share < 0.24


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_a_layout_that_is_not_contiguous(gating):
    """fairseq hands the layer a transposed view."""
    case = Case()
    x, _ = case.batch()
    layer = case.layer(gating, capacity_fraction=0.3)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not view.is_contiguous()
    torch.testing.assert_close(layer(view), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("max_positions, training, fraction", [(20, False, 0.1), (3, False, 0.5), (20, True, 0.1),
                                                               (20, False, -1.0)])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_capacity_by_max_positions(max_positions, training, fraction, num_choices):
    """`moe_eval_capacity_max_seqlen` counts rows times max positions, in evaluation with a fraction alone."""
    case = Case(rows=3, positions=8, num_choices=num_choices, skew=40.0)
    x, _ = case.batch()
    layer = case.layer("static", capacity_fraction=fraction, max_positions=max_positions).train(training)
    output, call = run(layer, x, None)
    capacity = reference.capacity_of(24, case.num_experts, num_choices, fraction, training, 3 * max_positions)
    expected = twin(case, layer, x, None, capacity=capacity)
    assert call.load == expected.load(case.num_experts)
    torch.testing.assert_close(output, expected.output, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("fraction", [0.25, 1.0, -1.0])
@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens_give_no_output(gating, fraction, shape):
    case = Case(num_choices=2)
    whole = case.layer(gating)
    layer = MOELayer(whole.gate, whole.experts, dispatcher_for(gating, StaticOptions(fraction)))
    x = torch.zeros(*shape, case.model_dim)
    assert layer.eval()(x).shape == x.shape
