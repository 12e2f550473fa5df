"""Options of fairseq's transformers that its own layers have and layers with experts do not: refused by their name."""

import pytest
import torch
from fairscale.nn.wrap import enable_wrap
from model_makers import language_model, translation_model
from served_models import EVERY_MODEL, Loader, logits

from fairseq_moe_ext.checkpoints.supported_fields import UnsupportedFieldError

MAKERS = [language_model, translation_model]


@pytest.fixture(scope="module")
def loader(shared_goldens) -> Loader:
    return Loader(shared_goldens)


# --- in training


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("field", "value"), [("quant_noise_pq", 0.1), ("quant_noise_scalar", 0.2), ("base_layers", 1)]
)
def test_an_option_that_does_not_reach_the_experts(make, field, value):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} .*must be 0.*got {value}"):
        make(**{field: value})
    if field != "base_layers":  # which want a process group
        make(**{field: value}, moe_freq=0)


def test_tied_adaptive_weights_need_adaptive_inputs():
    with pytest.raises(ValueError, match="tie_adaptive_weights .*adaptive_input"):
        language_model(tie_adaptive_weights=True, adaptive_softmax_cutoff="10,20")


@pytest.mark.parametrize("make", MAKERS)
def test_fully_sharded_training(make):
    """Which takes a layer's parameters away between its calls."""
    with enable_wrap(wrapper_cls=torch.nn.Sequential):
        with pytest.raises(ValueError, match="--ddp-backend fully_sharded .*layers with experts"):
            make(min_params_to_wrap=10**9)
    make()


# --- in serving


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize(("field", "value"), [("quant_noise_scalar", 0.2), ("base_layers", 2)])
def test_a_checkpoints_field_that_does_not_reach_the_experts(loader, name, field, value):
    with pytest.raises(UnsupportedFieldError, match=f"checkpoint field {field} .*must be .*0, got {value}"):
        loader.load(name, {field: value})
    assert torch.equal(loader.logits(name, {field: 0}), loader.logits(name, {}))


# --- exact: a model that keeps some layers of the checkpoint's


@pytest.mark.parametrize("kept", ["1,3", "0,3", "1", "0,2,3", "3,1"])
def test_kept_layers_are_the_checkpoints(loader, kept):
    model = loader.load("lm_top2", {})
    numbers = sorted(map(int, kept.split(",")))
    model.decoder.layers = torch.nn.ModuleList(model.decoder.layers[number] for number in numbers)
    pruned = loader.load("lm_top2", {"decoder_layers_to_keep": kept})
    assert len(pruned.decoder.layers) == len(numbers)
    assert torch.equal(logits(pruned), logits(model))


def test_kept_layers_in_training():
    model = translation_model(encoder_layers_to_keep="1,3", decoder_layers_to_keep="0,3")
    assert [hasattr(layer, "moe_layer") for layer in model.encoder.layers] == [True, True]
    assert [hasattr(layer, "moe_layer") for layer in model.decoder.layers] == [False, True]
