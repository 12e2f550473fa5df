"""Capacity-aware inference in a layer: phases, virtual ranks, CMR, padding; and that nothing waits for the host."""

import pytest
import torch
from cases import Case
from model_makers import language_model

from fairseq_moe_ext.gating.capacity import CAPACITY_SCOPES, OVERFLOWS, Capacity
from fairseq_moe_ext.gating.capacity import CapacityRules as Rules
from fairseq_moe_ext.gating.limit import Limit
from fairseq_moe_ext.gating.routing import Top2Gate

CASE = Case(rows=4, positions=9, num_experts=6, skew=3.0)


def served(rules: Rules | None, num_ranks: int = 1, case: Case = CASE, phases: str = "all"):
    """(layer, its calls): experts in rising number on the ranks."""
    layer = case.layer("dynamic")
    if rules is not None:
        ranks = [expert * num_ranks // case.num_experts for expert in range(case.num_experts)]
        layer.use(rules=[Limit(Capacity(rules, ranks, num_ranks), phases)])
    calls = []
    layer.prepare_for_serving(1, calls.append)
    return layer, calls


@torch.no_grad()
def output(layer, x, mask=None, decoding=False):
    return layer(x, mask, decoding)


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_decode_steps_are_free_if_asked(overflow):
    x, _ = CASE.batch()
    free = output(served(None)[0], x)
    layer, calls = served(Rules(0.3, overflow))
    capped = output(layer, x)
    assert (capped - free).abs().max() > 1e-3 and calls[0].dropped > 0
    assert torch.equal(output(layer, x, decoding=True), capped)
    layer, calls = served(Rules(0.3, overflow), phases="prefill")
    assert torch.equal(output(layer, x), capped)
    assert torch.equal(output(layer, x, decoding=True), free)
    assert calls[-1].dropped == calls[-1].rerouted == 0 and calls[-1].load_before == calls[-1].load


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@pytest.mark.parametrize("metric", ["score", "order", "reverse-order"])
def test_virtual_ranks_are_batches_of_their_own(overflow, metric):
    """Where own experts are nothing special, two ranks with half the sentences each are two batches."""
    x, _ = CASE.batch()
    rules = Rules(0.4, overflow, metric)
    together, calls = served(rules, num_ranks=2)
    alone, parts = served(rules)
    found = output(together, x)
    torch.testing.assert_close(found, torch.cat([output(alone, x[:2]), output(alone, x[2:])]))
    assert calls[0].load == [a + b for a, b in zip(parts[0].load, parts[1].load, strict=True)]
    assert calls[0].overflowing == pytest.approx(parts[0].overflowing + parts[1].overflowing)


def test_overflow_expands_to_experts_of_the_tokens_own_rank():
    layer, _ = served(Rules(0.4, "expand"), num_ranks=3)
    routing = layer.gate(CASE.batch()[0].flatten(0, 1))
    tokens = torch.arange(36) // 12  # each rank has 12 tokens
    limited = layer.rules[0].capacity.apply(routing, routing.weights, tokens)
    assert limited.rerouted.any()
    ranks = limited.routing.expert_ids // 2
    assert (ranks == tokens.unsqueeze(1))[limited.rerouted].all()


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("scope", CAPACITY_SCOPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_padding_does_not_count(overflow, scope, num_ranks):
    """A batch with three more rows of padding, wherever they stand, is served as without them."""
    x, _ = CASE.batch()
    layer, calls = served(Rules(0.4, overflow, scope=scope), num_ranks)
    wanted = output(layer, x)
    padded = torch.tensor([True, False, True, False, False, False, True])
    more = torch.randn(7, 9, x.size(2)).masked_scatter_(~padded.view(7, 1, 1), x)
    found = output(layer, more, padded.unsqueeze(1).expand(7, 9))
    torch.testing.assert_close(found[~padded], wanted)
    assert calls[0].load == calls[1].load and calls[0].dropped == calls[1].dropped > 0
    assert calls[0].load_before == calls[1].load_before and calls[0].overflowing == calls[1].overflowing
    assert (found[padded] == 0).all()


def test_a_layer_that_mixes_with_a_dense_branch_has_its_capacity():
    """CMR: a token whose experts are dropped keeps the dense branch's share."""
    model = language_model(moe_cmr=True).eval()
    decoder_layer = model.decoder.layers[1]
    layer = decoder_layer.moe_layer
    num_experts = layer.experts.num_experts
    layer.use(rules=[Limit(Capacity(Rules(0.01, metric="order"), [0] * num_experts, 1))])
    x = torch.randn(40, 1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = decoder_layer.fc1(x)
        share = torch.sigmoid(decoder_layer.cmr_layer.gate.wg(x))
        dense = decoder_layer._dense_feed_forward(x) * (1 - share)
        experts = layer(x.transpose(0, 1)).transpose(0, 1)
    dropped = (experts == 0).all(dim=2)
    assert 40 > int(dropped.sum()) >= 40 - num_experts
    torch.testing.assert_close(found[dropped], dense[dropped])
    assert (found - dense)[~dropped].abs().max() > 1e-3


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("scope", CAPACITY_SCOPES)
@pytest.mark.parametrize("metric", ["score", "order", "reverse-order"])
@pytest.mark.parametrize("preferring", [False, True])
def test_nothing_waits_for_the_host(overflow, scope, metric, preferring):
    """Meta tensors have no values: whatever looked at one, as a GPU's would have to be waited for, raises."""
    gate = Top2Gate(4, 6, second_expert_policy="all").to("meta")
    with torch.no_grad():
        routing = gate(torch.empty(10, 4, device="meta"), torch.zeros(10, dtype=torch.bool, device="meta"))
        weights = gate.combine_weights(routing).to(torch.float32)
    capacity = Capacity(Rules(1.0, overflow, metric, scope, renormalize=True), [0, 0, 0, 1, 1, 1], 2)
    capacity._ranks_of_experts = capacity._ranks_of_experts.to("meta")  # once, when the first batch comes
    capacity._experts_per_rank = capacity._experts_per_rank.to("meta")
    ranks = torch.zeros(10, dtype=torch.int64, device="meta")
    preferred = torch.zeros(6, dtype=torch.bool, device="meta") if preferring else None
    limited = capacity.apply(routing, weights, ranks, preferred)
    assert limited.routing.expert_ids.shape == limited.weights.shape == (10, 2) and limited.overflowing.shape == ()
    with pytest.raises(RuntimeError):
        limited.overflowing.item()
