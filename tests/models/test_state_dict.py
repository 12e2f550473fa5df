"""The state's keys and shapes are upstream's, both ways."""

import re

import commands
import pytest
import torch
from model_makers import language_model, translation_model

MODELS = {"lm_top1": 1, "lm_top2": 1, "lm_top2_ws2": 2, "mt_plain": 1, "mt_nllb_ws2": 2}


def keys_of_upstream(file) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the whole model, experts under their global number."""
    shapes: dict[str, dict] = {}
    for line in file.read_text().splitlines():
        if line.startswith("## "):
            section = shapes.setdefault(line.split()[1], {})
        elif line:
            key, shape, _ = line.split("\t")
            section[key] = tuple(int(number) for number in re.findall(r"\d+", shape))
    found = dict(shapes["checkpoint_last-shared.pt"])
    ranks = sorted(name for name in shapes if "-rank-" in name)
    for rank, name in enumerate(ranks):
        for key, shape in shapes[name].items():
            number = re.search(r"\.experts\.(\d+)\.", key)
            key = key.replace(number.group(), f".experts.{int(number.group(1)) + rank * 8 // len(ranks)}.")
            assert key not in found
            found[key] = shape
    return {key: shape for key, shape in found.items() if not key.endswith("_float_tensor")}  # gone in the release


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes(shared_goldens, name):
    folder = shared_goldens / name
    common = {"mt_plain": commands.MT, "mt_nllb_ws2": (*commands.NLLB, "-t", "de")}.get(name, commands.LM)
    command = "generate" if name.startswith("mt") else "eval_lm"
    model, _ = commands.load(command, folder / "data-bin", "--path", folder / "checkpoint_last.pt", *common)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == keys_of_upstream(
        folder / "keys.txt"
    )


@pytest.mark.parametrize("make", [language_model, translation_model])
@pytest.mark.parametrize("fields", [{}, {"moe_cmr": True}, {"moe_top1_expert": True}], ids=str)
def test_a_state_goes_round(make, fields):
    one, other = make(seed=0, **fields), make(seed=1, **fields)
    assert any(not torch.equal(one.state_dict()[key], tensor) for key, tensor in other.state_dict().items())
    other.load_state_dict(one.state_dict(), strict=True)
    for key, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[key], tensor), key


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "unknown part"])
def test_a_state_that_does_not_fit_is_refused_by_name(change):
    model = language_model()
    state = model.state_dict()
    prefix = "decoder.layers.3.moe_layer.experts"
    key = f"{prefix}.2.fc1.weight"
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        key = f"{prefix}.4.fc1.weight"
        state[key] = torch.zeros(24, 16)
    elif change == "unknown part":
        key = f"{prefix}.2.fc3.weight"
        state[key] = torch.zeros(24, 16)
    else:
        state[key] = torch.zeros(24, 15)
    with pytest.raises(RuntimeError, match=re.escape(key)):
        model.load_state_dict(state, strict=True)
