"""Conditional MoE routing and NormFormer's fields in one layer; such models train, save and load."""

import pytest
import torch
from model_makers import WORDS, language_model, sentences, translation_input, translation_model

CMR = {"moe_cmr": True}


def randomized(model, seed: int = 3):
    """All weights drawn anew, so that none is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (0 if "bias" in name else 1))
    return model


@pytest.mark.parametrize("scale_fc", [False, True])
def test_output_is_the_mix_of_dense_and_experts(scale_fc):
    layer = randomized(language_model(**CMR, scale_fc=scale_fc)).eval().decoder.layers[1]
    x = torch.randn(7, 2, 16, generator=torch.Generator().manual_seed(0))
    modules, gate = layer._modules, layer.cmr_layer.gate.wg
    hidden = torch.relu(modules["fc1"](x))
    assert ("ffn_layernorm" in modules) == scale_fc
    dense = modules["fc2"](modules["ffn_layernorm"](hidden) if scale_fc else hidden)
    share = torch.sigmoid(x @ gate.weight.T + gate.bias)
    experts = layer.moe_layer(x.transpose(0, 1)).transpose(0, 1)
    wanted = dense * (1 - share) + experts * share
    torch.testing.assert_close(layer.fc1(x), wanted, rtol=1e-5, atol=1e-6)
    assert (dense - experts).abs().max() > 0.1


def test_padding_goes_to_the_dense_branch_alone():
    layer = randomized(translation_model(**CMR)).eval().encoder.layers[1]
    x = torch.randn(7, 2, 16)
    layer._padding_mask = torch.zeros(2, 7, dtype=torch.bool)
    layer._padding_mask[1, 4:] = True
    modules = layer._modules
    dense = modules["fc2"](torch.relu(modules["fc1"](x)))
    found = layer.fc1(x)
    torch.testing.assert_close(found[4:, 1], dense[4:, 1])
    assert not torch.allclose(found[:4, 1], dense[:4, 1])


def test_state_has_upstreams_names():
    keys = set(language_model(**CMR, scale_fc=True).state_dict())
    layer = "decoder.layers.1"
    for name in ("fc1.weight", "fc2.bias", "ffn_layernorm.weight", "cmr_layer.gate.wg.weight"):
        assert f"{layer}.{name}" in keys
    assert f"{layer}.cmr_layer.gate.wg.bias" in keys
    for owner in ("moe_layer", "cmr_layer.moe_layer"):
        assert f"{layer}.{owner}.gate.wg.weight" in keys
        assert f"{layer}.{owner}.experts.3.fc2.bias" in keys
    assert "decoder.layers.0.cmr_layer.gate.wg.weight" not in keys


def test_the_log_of_languages_is_left_aside():
    model = language_model(**CMR)
    state = model.state_dict()
    state["decoder.layers.1.cmr_layer.lang_idx"] = torch.arange(4)
    state["decoder.layers.3.cmr_layer.lang_idx"] = torch.arange(4)
    language_model(**CMR, seed=1).load_state_dict(state, strict=True)


MODELS = {
    "cmr": {**CMR},
    "cmr with scale_fc": {**CMR, "scale_fc": True, "cmr_gate_drop": 0.2},
    "normformer": {"scale_attn": True, "scale_fc": True, "scale_heads": True, "scale_resids": True},
    "masking": {"moe_eom": 0.2, "moe_fom": 0.1, "activation_dropout": 0.1},
    "top 1": {"moe_top1_expert": True},
    "sampling": {"moe_second_expert_policy": "sampling"},
    "random": {"moe_second_expert_policy": "random"},
    "static": {"moe_gating": "static", "moe_batch_prioritized_routing": True, "use_moe_pad_mask": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_training_then_save_and_load(name, tmp_path):
    fields = MODELS[name]
    model = language_model(**fields).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = sentences(left_pad=False)
    logits = model(tokens[:, :-1])[0]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, WORDS), tokens[:, 1:].reshape(-1), ignore_index=1)
    loss = loss + sum(layer.gate_loss() for layer in model.moe_layers().values())
    loss.backward()
    optimizer.step()
    after = model.state_dict()
    learned = [".gate.wg.weight", ".experts.", ".self_attn."] + ["cmr_layer.gate.wg.bias"] * ("cmr" in name)
    for part in learned:
        assert any(part in key and not torch.equal(before[key], after[key]) for key in after), part

    torch.save(after, tmp_path / "state.pt")
    loaded = language_model(**fields, seed=9)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    model.eval(), loaded.eval()
    if name not in ("sampling", "random"):
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0], rtol=0, atol=0)


@pytest.mark.parametrize("fields", [{}, CMR, {"share_all_embeddings": True, "moe_eom": 0.2}], ids=str)
def test_a_translation_model_trains_too(fields):
    model = translation_model(**fields).train()
    model(**translation_input())[0].sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_normformers_norm_inside_the_feed_forward_is_the_dense_layers():
    keys = set(language_model(scale_fc=True).state_dict())
    assert "decoder.layers.0.ffn_layernorm.weight" in keys
    assert "decoder.layers.1.ffn_layernorm.weight" not in keys


@pytest.mark.parametrize("pad_mask", [True, False])
def test_without_a_mask_static_gating_mixes_on_padding_as_upstream_does(pad_mask):
    """There padding takes slots in later layers, so that what it is made of counts."""
    model = randomized(language_model(**CMR, moe_gating="static", use_moe_pad_mask=pad_mask)).eval()
    layer = model.decoder.layers[1]
    x, mask = torch.randn(6, 3, 16), torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 4:] = True
    seen = []
    layer.cmr_layer.gate.register_forward_hook(lambda _gate, _inputs, share: seen.append(share))
    with torch.no_grad():
        layer(x, self_attn_padding_mask=mask)
    assert bool(seen[0][mask].any()) != pad_mask and seen[0][~mask].all()
