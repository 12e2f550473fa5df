"""The named architectures have the published models' shapes; the fields put MoE layers where upstream puts them."""

from argparse import Namespace

import pytest
import torch
from model_makers import Vocabulary, arguments, language_model, translation_model

from fairseq_moe_ext.checkpoints.moe_config import MoEConfig, has_moe_layers
from fairseq_moe_ext.models.moe_transformer import MoETransformerModel
from fairseq_moe_ext.models.moe_transformer_lm import MoETransformerLanguageModel
from fairseq_moe_ext.models.transformer_layer import MoETransformerDecoderLayer, MoETransformerEncoderLayer


def on_meta(model_class, arch: str, vocabulary: int, **fields):
    """The architecture at full size, without its memory."""
    task = Vocabulary(vocabulary)
    with torch.device("meta"):
        return model_class.build_model(arguments(arch, **fields), task)


def billions(model) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


@pytest.mark.parametrize(("size", "layers", "model_dim", "parameters"), [("15b", 12, 768, 15), ("52b", 24, 1024, 52)])
def test_published_language_models(size, layers, model_dim, parameters):
    model = on_meta(MoETransformerLanguageModel, f"moe_transformer_lm_{size}", 51200, tokens_per_sample=1024)
    assert list(model.moe_layers()) == [f"decoder.layers.{i}.moe_layer" for i in range(1, layers, 2)]
    assert len(model.decoder.layers) == layers
    experts = model.decoder.layers[1].moe_layer.experts
    assert experts.fc1_weight.shape == (512, 4 * model_dim, model_dim)
    assert experts.fc2_bias.shape == (512, model_dim)
    assert round(billions(model)) == parameters


def test_published_translation_model():
    model = on_meta(MoETransformerModel, "moe_transformer_nllb_54b", 256206)
    assert list(model.moe_layers()) == [
        f"{side}.layers.{i}.moe_layer" for side in ("encoder", "decoder") for i in range(3, 24, 4)
    ]
    layer = model.encoder.layers[3].moe_layer
    assert layer.experts.fc1_weight.shape == (128, 8192, 2048)
    assert layer.gate.use_fp32
    assert layer.gate.second_expert_policy == "all"
    assert layer.output_masking == 0.2
    assert model.encoder.layers[3].self_attn.num_heads == model.decoder.layers[3].encoder_attn.num_heads == 16
    assert model.encoder.layers[0].normalize_before
    assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight
    assert billions(model) == pytest.approx(54.5, abs=0.1)


def places(layers, kind) -> list[int]:
    return [number for number, layer in enumerate(layers) if isinstance(layer, kind)]


@pytest.mark.parametrize(
    ("fields", "encoder", "decoder"),
    [
        ({"moe_freq": 1}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"moe_freq": 2}, [1, 3], [1, 3]),
        ({"moe_freq": 3}, [2], [2]),
        ({"moe_freq": 5}, [], []),
        ({"moe_freq": 0, "encoder_moe_freq": 2}, [1, 3], []),
        ({"moe_freq": 0, "decoder_moe_freq": 4}, [], [3]),
        ({"moe_freq": 2, "encoder_moe_freq": 3}, [2], [1, 3]),
        ({"moe_freq": 4, "decoder_moe_freq": 1}, [3], [3]),  # the larger counts
    ],
    ids=str,
)
def test_where_moe_layers_stand(fields, encoder, decoder):
    model = translation_model(**fields)
    assert places(model.encoder.layers, MoETransformerEncoderLayer) == encoder
    assert places(model.decoder.layers, MoETransformerDecoderLayer) == decoder
    for side, numbers in (("encoder", encoder), ("decoder", decoder)):
        for number in range(4):
            keys = {key for key in model.state_dict() if key.startswith(f"{side}.layers.{number}.")}
            dense = f"{side}.layers.{number}.fc1.weight" in keys
            assert dense != (number in numbers)
            assert dense != any(".moe_layer.experts.3.fc2.bias" in key for key in keys)


def test_where_moe_layers_stand_in_language_models():
    assert places(language_model(moe_freq=3).decoder.layers, MoETransformerDecoderLayer) == [2]
    assert places(language_model(moe_freq=0, decoder_moe_freq=2).decoder.layers, MoETransformerDecoderLayer) == [1, 3]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, False), ({"moe_freq": 0}, False), ({"moe_freq": 2}, True), ({"encoder_moe_freq": 1}, True)],
    ids=str,
)
def test_which_arguments_ask_for_moe_layers(fields, expected):
    assert has_moe_layers(Namespace(**fields)) is expected


def test_missing_fields_have_upstreams_defaults():
    config = MoEConfig.from_args(Namespace())
    assert config.moe_second_expert_policy == "sampling"
    assert config.moe_eval_capacity_token_fraction == 0.25
    assert config.moe_gating == "dynamic"
    assert not config.use_moe_pad_mask
    assert config.batch_size is None


@pytest.mark.parametrize(("count", "word"), [(0, "moe_expert_count"), (1, "num_experts")])
def test_too_few_experts_are_refused(count, word):
    with pytest.raises(ValueError, match=f"{word} must be at least .* got {count}"):
        language_model(moe_expert_count=count)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"moe_second_expert_policy": "best"}, "second_expert_policy must be one of all, sampling, random, got 'best'"),
        ({"moe_eom": 1.5}, r"moe_eom.* must be in \[0, 1\), got 1.5"),
        ({"moe_gating": "sparse"}, "gating must be one of dynamic, static, got 'sparse'"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        language_model(**fields)


def test_alternate_hidden_dims_put_dense_layers_in_the_place():
    model = translation_model(alternate_ffn_embed_dim=10)
    assert places(model.encoder.layers, MoETransformerEncoderLayer) == []
    assert [layer.fc1.out_features for layer in model.encoder.layers] == [24, 10, 24, 10]
    assert [layer.fc2.in_features for layer in model.encoder.layers] == [24, 10, 24, 10]
    assert places(model.decoder.layers, MoETransformerDecoderLayer) == [1, 3]

    model = translation_model(alternate_decoder_ffn_embed_dim=12)
    assert places(model.encoder.layers, MoETransformerEncoderLayer) == [1, 3]
    assert [layer.fc1.out_features for layer in model.decoder.layers] == [24, 12, 24, 12]


def test_both_alternate_hidden_dims_leave_no_experts():
    model = translation_model(alternate_ffn_embed_dim=10, alternate_decoder_ffn_embed_dim=12)
    assert model.moe_layers() == {}
