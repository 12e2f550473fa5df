"""The gate loss and the metadata, against loops over tokens and experts."""

import math

import pytest
import reference
import torch
from cases import Case, examples, layer_cases
from hypothesis import given
from hypothesis import strategies as st


def run(case, gating, **options):
    layer = case.layer(gating, **options)
    x, mask = case.batch()
    with torch.no_grad():
        layer(x, mask)
    _, probabilities = reference.gate_scores(x.flatten(0, 1), layer.gate.wg.weight.detach(), case.use_fp32)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return layer, probabilities, mask.flatten().tolist(), x


@examples(40)
@given(layer_cases(min_tokens=1), st.sampled_from(("dynamic", "static")))
def test_gate_loss_is_gshards(case, gating):
    """The same under every gating: it is taken before the capacity."""
    layer, probabilities, padded, _ = run(case, gating, capacity_fraction=0.1, count_padding=False)
    first = [max(range(len(row)), key=lambda e: (row[e], -e)) for row in probabilities.tolist()]
    expected = reference.gate_loss(probabilities, first, padded)
    assert layer.gate_loss().item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_gate_loss_of_even_routing_is_one_and_of_one_expert_the_number_of_experts():
    even = Case(rows=1, positions=4, num_experts=4, model_dim=4, hidden_dim=3)
    layer = even.layer()
    with torch.no_grad():
        layer.gate.wg.weight.copy_(torch.eye(4))
        layer(torch.eye(4).unsqueeze(0) * 50)
        assert layer.gate_loss().item() == pytest.approx(1.0)
        layer(torch.eye(4)[:1].expand(1, 4, 4) * 50)
        assert layer.gate_loss().item() == pytest.approx(4.0)


@examples(40)
@given(
    layer_cases(min_tokens=1),
    st.sampled_from((0.05, 0.25, 1.0, None)),
    st.booleans(),
)
def test_metadata_is_upstreams(case, fraction, batch_prioritized):
    """fraction None: dynamic gating, where nothing overflows."""
    gating = "dynamic" if fraction is None else "static"
    static = {} if fraction is None else {"capacity_fraction": fraction, "batch_prioritized": batch_prioritized}
    layer, probabilities, padded, x = run(case, gating, count_padding=False, **static)
    num_tokens, num_experts, num_choices = len(padded), case.num_experts, case.num_choices
    logits, _ = reference.gate_scores(x.flatten(0, 1), layer.gate.wg.weight.detach(), case.use_fp32)
    chosen = reference.choose(logits, probabilities, num_choices)
    wanted = [[not pad] * num_choices for pad in padded]
    order = list(range(num_tokens))
    if batch_prioritized and num_choices == 2:
        order.sort(key=lambda token: -max(probabilities[token].tolist()))
    slots = reference.queue(chosen, wanted, order)
    capacity = math.inf if fraction is None else math.ceil(fraction * num_tokens)

    eps = torch.finfo(probabilities.dtype).eps
    entropies = [-sum(p * math.log(min(max(p, eps), 1 - eps)) for p in row) for row in probabilities.tolist()]
    expected = {"entropy_gating": sum(entropies) / num_tokens}
    sample = max(math.ceil(num_experts * 0.2), 1)
    for choice in range(num_choices):
        name = f"expert{choice + 1}"
        queued = [token for token in range(num_tokens) if wanted[token][choice]]
        over = [token for token in queued if slots[token][choice] >= capacity]
        expected[f"overflow_{name}"] = 100 * len(over) / len(queued) if queued else math.nan
        # upstream counts padding here, too
        shares = sorted((100 * sum(pair[choice] == e for pair in chosen) / num_tokens for e in range(num_experts)),
                        reverse=True)
        expected[f"unused_{name}_count"] = shares.count(0)
        expected[f"{name}_balance_top"] = sum(shares[:sample])
        expected[f"{name}_balance_bottom"] = sum(shares[num_experts - sample :])

    metadata = layer.metadata()
    assert set(metadata) == set(expected)
    for name, value in expected.items():
        assert metadata[name].item() == pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True), name
        assert not metadata[name].requires_grad


def test_the_statistics_are_of_the_last_call():
    case = Case(rows=4, positions=8)
    layer = case.layer().train()
    x, _ = case.batch()
    layer(x)
    first = layer.gate_loss().item()
    layer(x[:1])
    assert layer.gate_loss().item() != first
    layer(x)
    assert layer.gate_loss().item() == first
