"""Training under --checkpoint-activations: the same losses, gradients and statistics, each layer computed twice."""

import copy

import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from model_makers import Vocabulary, language_model, sentences, translation_input, translation_model
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_moe_ext.gating import MOELayer

DRAWN = {  # whatever is drawn at random in training
    "moe_second_expert_policy": "sampling",
    "dropout": 0.2,
    "activation_dropout": 0.3,
    "moe_eom": 0.2,
    "moe_fom": 0.1,
}
KINDS = {
    "lm": lambda **fields: (language_model(**fields), {"src_tokens": sentences()}),
    "mt": lambda **fields: (translation_model(**fields), translation_input()),
    "mt cmr": lambda **fields: (translation_model(moe_cmr=True, cmr_gate_drop=0.2, **fields), translation_input()),
    "mt alternate": lambda **fields: (translation_model(alternate_ffn_embed_dim=12, **fields), translation_input()),
}


def train_once(kind: str, criterion=None, **fields):
    """(model, loss, logging output) of one forward and backward pass."""
    model, net_input = KINDS[kind](**DRAWN, **fields)
    target = sentences(seed=5) if kind == "lm" else net_input["prev_output_tokens"].clone()
    sample = {"net_input": net_input, "target": target, "ntokens": int(target.ne(1).sum()), "nsentences": len(target)}
    torch.manual_seed(3)
    criterion = criterion or MoECrossEntropyCriterion(Vocabulary(), False, 0.5, "average", "none")
    loss, _, logged = criterion(model.train(), sample)
    loss.backward()
    return model, loss, logged


@pytest.mark.parametrize("how", ["checkpoint_activations", "offload_activations"])
@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_statistics_are_the_same(kind, gating, how):
    plain, loss, logged = train_once(kind, moe_gating=gating)
    twice, found, logged_twice = train_once(kind, moe_gating=gating, **{how: True})
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(logged_twice, logged)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert all(gradients[name].abs().max() > 0 for name in gradients if ".moe_layer.gate." in name)
    torch.testing.assert_close({name: parameter.grad for name, parameter in twice.named_parameters()}, gradients)
    for layer, other in zip(twice.moe_layers().values(), plain.moe_layers().values(), strict=True):
        assert torch.equal(layer.gate_loss(), other.gate_loss())


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_computed_again_in_the_backward_pass(kind):
    """fairseq's own dense layers and those with experts."""
    calls = []
    hook = register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        model, _, _ = train_once(kind, checkpoint_activations=True)
    finally:
        hook.remove()
    layers = [layer for side in ("encoder", "decoder") if hasattr(model, side) for layer in getattr(model, side).layers]
    assert [sum(call is layer.self_attn for call in calls) for layer in layers] == [2] * len(layers)


def test_a_criterion_without_a_gate_loss():
    plain, loss, _ = train_once("lm", CrossEntropyCriterion(Vocabulary(), False))
    twice, found, _ = train_once("lm", CrossEntropyCriterion(Vocabulary(), False), checkpoint_activations=True)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close([each.grad for each in twice.parameters()], [each.grad for each in plain.parameters()])


def test_a_copied_model_computes_with_its_own_weights():
    """As fairseq's --store-ema copies it."""
    model = language_model(checkpoint_activations=True).train()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(sentences())[0].any()
    assert model(sentences())[0].any()


def test_a_gate_loss_without_a_gradient_is_refused():
    """Any other activation checkpoint throws away the graph of the call."""
    model = language_model().train()
    layer = next(module for module in model.modules() if isinstance(module, MOELayer))
    checkpoint(layer, torch.randn(2, 3, 16, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="gate loss has no gradient"):
        layer.gate_loss().backward()


def test_layers_that_layer_drop_leaves_out_have_no_gate_loss():
    """Else the graph of an earlier step would be gone through again."""
    criterion = MoECrossEntropyCriterion(Vocabulary(), False, 0.5, "average", "none")
    model, target = language_model(decoder_layerdrop=0.5).train(), sentences(seed=5)
    sample = {"net_input": {"src_tokens": sentences()}, "target": target, "ntokens": 40, "nsentences": 5}
    called, seen = [], set()
    for layer in model.moe_layers().values():
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    for seed in range(20):
        called.clear()
        torch.manual_seed(seed)
        loss, _, logged = criterion(model, sample)
        loss.backward()
        seen.add(len(called))
        wanted = sum(float(layer.gate_loss()) for layer in called) / max(len(called), 1)
        assert float(logged["moe_loss"]) == pytest.approx(40 * wanted)
        assert set(logged) >= {"entropy_gating", "batch_count"}
    assert seen == {0, 1, 2}
