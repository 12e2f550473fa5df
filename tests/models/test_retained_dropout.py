"""--retain-dropout reaches the dropout inside the experts, under upstream's names, or is refused by its name."""

import commands
import pytest
import torch
from model_makers import language_model, sentences, translation_input, translation_model
from omegaconf import OmegaConf

DROPOUTS = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "relu_dropout": 0.0}
EXPERTS = {"lm": "TransformerDecoderLayer", "mt": "TransformerEncoderLayer"}
MAKERS = {"lm": language_model, "mt": translation_model}


def served(kind: str, modules=None, retain=True, setup=None, **fields):
    model = MAKERS[kind](**{**DROPOUTS, **fields})
    if setup is not None:
        setup(model)
    generation = {"beam": 1, "retain_dropout": retain, "retain_dropout_modules": modules}
    model.eval().prepare_for_inference_(OmegaConf.create({"generation": generation, "common": {"seed": 1}}))
    return model


@torch.no_grad()
def output(model, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    net_input = translation_input() if hasattr(model, "encoder") else {"src_tokens": sentences()}
    return model(**net_input)[0]


def is_random(model) -> bool:
    assert torch.equal(output(model, 0), output(model, 0))
    return not torch.equal(output(model, 0), output(model, 1))


def only_the_experts(kind: str, **fields) -> dict:
    """Every layer but those with experts has an activation that is zero, so that its own dropout shows nowhere."""
    def setup(model):
        for side in ("encoder", "decoder"):
            for layer in getattr(getattr(model, side, None), "layers", ()):
                if not hasattr(layer, "moe_layer"):
                    layer.fc1.weight.data.zero_()
                    layer.fc1.bias.data.zero_()

    return {"setup": setup, **fields}


@pytest.mark.parametrize("field", ["activation_dropout", "relu_dropout"])
@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("kind", MAKERS)
def test_retained_dropout_reaches_the_experts(kind, gating, field):
    fields = only_the_experts(kind, moe_gating=gating, **{field: 0.4})
    assert is_random(served(kind, **fields))
    assert not is_random(served(kind, retain=False, **fields))


def test_the_experts_output_is_that_of_training():
    """Which drops what is retained: the same numbers are drawn."""
    model = served("lm", activation_dropout=0.4)
    trained = language_model(**{**DROPOUTS, "activation_dropout": 0.4}).train()
    assert torch.equal(output(model, 5), output(trained, 5))


@pytest.mark.parametrize(
    "modules", ["TransformerDecoderLayer", '["TransformerDecoderLayer"]', "['TransformerDecoderLayerBase']",
                "TransformerModel,TransformerDecoderLayer", ["MoETransformerDecoderLayer"]]
)
def test_modules_are_named_as_upstream_names_them(modules):
    model = served("mt", modules, **only_the_experts("mt", activation_dropout=0.4))
    retained = {name.split(".")[0] for name, layer in model.moe_layers().items() if layer.experts.retains_dropout}
    assert retained == {"decoder"} and is_random(model)


def test_a_module_is_not_named_by_a_part_of_another_ones_name():
    """fairseq looks for names in the text of the flag."""
    fields = {"dropout": 0.4, "activation_dropout": 0.4}
    model = served("mt", "TransformerEncoderLayer", **fields)
    assert not model.encoder.dropout_module.apply_during_inference
    assert all(layer.dropout_module.apply_during_inference for layer in model.encoder.layers)
    assert not any(layer.dropout_module.apply_during_inference for layer in model.decoder.layers)


def test_conditional_routings_gate_and_dense_branch():
    assert is_random(served("lm", moe_cmr=True, cmr_gate_drop=0.5))
    assert not is_random(served("lm", "TransformerDecoder", moe_cmr=True, cmr_gate_drop=0.5))
    model = served("lm", "CMRGate", moe_cmr=True, cmr_gate_drop=0.5, activation_dropout=0.5)
    assert is_random(model) and not any(layer.experts.retains_dropout for layer in model.moe_layers().values())


def test_upstreams_name_of_an_expert_is_the_experts_alone():
    fields = {"dropout": 0.4, "activation_dropout": 0.4, "moe_cmr": True}
    model = served("lm", "FeedForwardNetwork", **fields)
    assert all(layer.experts.retains_dropout for layer in model.moe_layers().values())
    assert not any(layer.dropout_module.apply_during_inference for layer in model.decoder.layers)
    assert not any(layer._dense_dropout.apply_during_inference for layer in model.decoder.layers[1::2])
    model = served("lm", "TransformerDecoderLayer", **fields)
    assert all(layer._dense_dropout.apply_during_inference for layer in model.decoder.layers[1::2])
    assert all(layer.experts.retains_dropout for layer in model.moe_layers().values())


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ("TransformerEncoderlayer", "must name modules of the model.*got TransformerEncoderlayer"),
        ("TransformerModel", "must name a module with dropout.*TransformerDecoderLayer.*got TransformerModel"),
        ("[", "must be names or a list of names, got '\\['"),
        ("", "must be names or a list of names, got ''"),
    ],
)
def test_names_without_effect_are_refused(modules, words):
    with pytest.raises(ValueError, match=f"--retain-dropout-modules {words}"):
        served("mt", modules, activation_dropout=0.1)


def test_modules_without_the_flag_are_refused():
    with pytest.raises(ValueError, match="--retain-dropout-modules must go with --retain-dropout"):
        served("mt", "TransformerEncoderLayer", retain=False, activation_dropout=0.1)


@pytest.mark.parametrize("kernel", ["triton", "grouped-mm"])
def test_kernels_without_dropout_are_refused(kernel):
    def setup(model):
        for layer in model.moe_layers().values():
            layer.experts.use_kernel(kernel)

    with pytest.raises(ValueError, match=f"--retain-dropout .*--moe-kernel {kernel}"):
        served("lm", setup=setup, activation_dropout=0.1)
    served("lm", setup=setup, dropout=0.1)  # none inside the experts


def test_experts_in_a_buffer_have_no_dropout(shared_goldens):
    golden = shared_goldens / "mt_plain"
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_last.pt", *commands.MT, "--retain-dropout")
    for buffered in ((), ("--expert-buffer-size", "2")):
        commands.load("generate", *arguments, *buffered, overrides={"activation_dropout": 0.0})
    model, _ = commands.load("generate", *arguments, overrides={"activation_dropout": 0.3})
    assert is_random(model)
    with pytest.raises(ValueError, match="--retain-dropout .*--expert-buffer-size"):
        commands.load("generate", *arguments, "--expert-buffer-size", "2", overrides={"activation_dropout": 0.3})
