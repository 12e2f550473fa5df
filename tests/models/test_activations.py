"""The activations that fairseq has, by name, in experts and in the dense layers beside them."""

import math

import pytest
import torch
from activations import NAMES
from model_makers import language_model, translation_input, translation_model

from fairseq_moe_ext.models.transformer_layer import activation_named


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_fast": tanh_gelu,
    "gelu_accurate": tanh_gelu,
    "tanh": math.tanh,
    "linear": lambda x: x,
    "swish": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_its_formula(name):
    values = torch.linspace(-4, 4, 33)
    expected = torch.tensor([FORMULAS[name](value) for value in values.tolist()])
    torch.testing.assert_close(activation_named(name)(values.clone()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{"moe_freq": 2}, {"moe_freq": 2, "moe_cmr": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_models_with_dense_and_mixed_layers(name, fields):
    """Each activation gives another output."""
    with torch.no_grad():
        outputs = [
            translation_model(activation_fn=chosen, **fields).eval()(**translation_input())[0]
            for chosen in (name, "relu" if name != "relu" else "tanh")
        ]
        assert language_model(activation_fn=name, **fields).eval()(torch.tensor([[2, 5, 6]]))[0].isfinite().all()
    assert outputs[0].isfinite().all() and not torch.allclose(*outputs)
