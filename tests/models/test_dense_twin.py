"""With all experts alike a MoE model computes what fairseq's dense transformer does: attention, norms, residuals."""

import pytest
import torch
from fairseq import utils
from model_makers import dense_twin, language_model, sentences, translation_input, translation_model

NORMFORMER = {"scale_attn": True, "scale_heads": True, "scale_resids": True}


def assert_same_output(model, twin, **net_input) -> None:
    model.eval()
    with torch.no_grad():
        found, wanted = model(**net_input)[0], twin(**net_input)[0]
    real = net_input.get("prev_output_tokens", net_input["src_tokens"]).ne(1)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", utils.get_available_activation_fns())
def test_every_activation_of_fairseq(activation):
    fields = {"activation_fn": activation}
    assert_same_output(model := language_model(**fields), dense_twin(model, **fields), src_tokens=sentences())


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("normalize_before", [True, False])
@pytest.mark.parametrize("left_pad", [True, False])
def test_pre_norm_and_post_norm_translation(normalize_before, left_pad, gating):
    fields = {"encoder_normalize_before": normalize_before, "decoder_normalize_before": normalize_before}
    options = {"moe_gating": gating, "moe_eval_capacity_token_fraction": 1.0}
    model = translation_model(**fields, **options)
    assert_same_output(model, dense_twin(model, **fields), **translation_input(left_pad))


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder_learned_pos": True},
        {"decoder_normalize_before": True, "no_decoder_final_norm": True},
        {"moe_freq": 1},
        {"moe_freq": 3},
        {"layernorm_embedding": True, "no_scale_embedding": True},
        {"moe_gating_use_fp32": True, "moe_normalize_gate_prob_before_dropping": True},
        {"decoder_normalize_before": True, **NORMFORMER},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_language_models_of_other_shapes(fields):
    model = language_model(**fields)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("attn_ln", "c_attn", "w_resid")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if "scale_attn" in fields:
        assert {"decoder.layers.1.attn_ln.weight", "decoder.layers.1.c_attn", "decoder.layers.1.w_resid"} <= set(
            model.state_dict()
        )
    assert_same_output(model, dense_twin(model, **fields), src_tokens=sentences())


@pytest.mark.parametrize(
    "fields",
    [
        {"share_all_embeddings": True},
        {"encoder_learned_pos": True, "decoder_learned_pos": True},
        {"moe_freq": 1},
        {"encoder_layers": 3, "decoder_layers": 1, "moe_freq": 3},
        {"no_cross_attention": True, "cross_self_attention": True},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_translation_models_of_other_shapes(fields):
    model = translation_model(**fields)
    assert_same_output(model, dense_twin(model, **fields), **translation_input())


def test_the_twin_notices_another_expert():
    model = language_model()
    twin = dense_twin(model)
    with torch.no_grad():
        model.decoder.layers[1].moe_layer.experts.fc1_bias[2] += 1.0
    with pytest.raises(AssertionError):
        assert_same_output(model, twin, src_tokens=sentences())


@pytest.mark.parametrize("field", ["moe_eom", "moe_fom"])
def test_output_masking_scales_the_feed_forward_in_evaluation(field):
    model = language_model(**{field: 0.2})
    twin = dense_twin(model)
    with torch.no_grad():
        for number in (1, 3):
            twin.decoder.layers[number].fc2.weight *= 0.8
            twin.decoder.layers[number].fc2.bias *= 0.8
    assert_same_output(model, twin, src_tokens=sentences())


def test_top_1_scales_by_the_probability():
    model = language_model(moe_top1_expert=True).eval()
    layer = dense_twin(model).decoder.layers[1]
    x = torch.randn(6, 3, 16)
    probability = model.decoder.layers[1].moe_layer.gate.wg(x).softmax(dim=2).max(dim=2, keepdim=True).values
    with torch.no_grad():
        wanted = layer.fc2(layer.activation_fn(layer.fc1(x))) * probability
        torch.testing.assert_close(model.decoder.layers[1].fc1(x), wanted, rtol=1e-4, atol=1e-5)
