"""Fields that need other weights than a golden's (files made on the spot), and where an override may stand."""

import commands
import pytest
import torch
from served_models import EVERY_MODEL, PADDING, Loader, logits

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.supported_fields import UnsupportedFieldError


@pytest.fixture(scope="module")
def loader(shared_goldens) -> Loader:
    return Loader(shared_goldens)


def other_checkpoint(goldens, name: str, folder, change) -> str:
    """A merged copy of a golden whose state went through `change(state's model, layer prefixes, dim)`."""
    files = (goldens / name / f"checkpoint_last-{part}.pt" for part in ("shared", "rank-0"))
    shared, state = map(commands.read_state, files)
    state["model"] = model = {**shared["model"], **state["model"]}
    prefixes = sorted({key.partition(".moe_layer.")[0] for key in model if ".moe_layer." in key})
    change(model, prefixes, model[f"{prefixes[0]}.moe_layer.gate.wg.weight"].size(1))
    torch.save(state, folder / "other.pt")
    return str(folder / "other.pt")


def dense(prefix: str, model_dim: int, hidden_dim: int, generator) -> dict[str, torch.Tensor]:
    shapes = {"fc1.weight": (hidden_dim, model_dim), "fc1.bias": (hidden_dim,)}
    shapes |= {"fc2.weight": (model_dim, hidden_dim), "fc2.bias": (model_dim,)}
    return {f"{prefix}.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.mark.parametrize(("name", "hidden_dim"), [("lm_top2", 128), ("mt_plain", 96)])
def test_conditional_routing_mixes_the_experts_with_a_dense_branch(loader, tmp_path, name, hidden_dim):
    generator = torch.Generator().manual_seed(0)

    def make(share: float | None):
        def change(model, prefixes, model_dim):
            for prefix in prefixes:
                model.update(dense(prefix, model_dim, hidden_dim, generator))
                for key in [key for key in model if key.startswith(f"{prefix}.moe_layer.")]:
                    model[key.replace(".moe_layer.", ".cmr_layer.moe_layer.")] = model[key]
                weight = torch.randn(1, model_dim, generator=generator)
                model[f"{prefix}.cmr_layer.gate.wg.weight"] = weight if share is None else 0 * weight
                model[f"{prefix}.cmr_layer.gate.wg.bias"] = torch.full((1,), 0.0 if share is None else share)
                model[f"{prefix}.cmr_layer.lang_idx"] = torch.zeros(3, dtype=torch.long)

        path = other_checkpoint(loader.goldens, name, tmp_path, change)
        return loader.logits(name, {"moe_cmr": True, "cmr_gate_drop": 0.5}, path=path)

    without = loader.logits(name, {})
    real = ~PADDING  # on padding the dense branch is all there is
    if name == "lm_top2":
        torch.testing.assert_close(make(50.0)[real], without[real])  # the experts' share is 1
    assert (make(-50.0) - without)[real].abs().max() > 1e-2  # the dense branch alone
    assert (make(None) - without)[real].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "field", "side", "hidden_dim"),
    [
        ("lm_top2", "alternate_decoder_ffn_embed_dim", "decoder", 40),
        ("mt_plain", "alternate_decoder_ffn_embed_dim", "decoder", 72),
        ("mt_plain", "alternate_ffn_embed_dim", "encoder", 40),
    ],
)
def test_dense_layers_stand_where_experts_would(loader, tmp_path, name, field, side, hidden_dim):
    generator = torch.Generator().manual_seed(0)
    sides = ["decoder"] if name == "lm_top2" else ["encoder", "decoder"]
    fields = {"encoder": "alternate_ffn_embed_dim", "decoder": "alternate_decoder_ffn_embed_dim"}
    dims = {s: hidden_dim if s == side else 56 for s in sides}

    def change(model, prefixes, model_dim):
        for prefix in prefixes:
            for key in [key for key in model if key.startswith(f"{prefix}.moe_layer.")]:
                del model[key]
            model.update(dense(prefix, model_dim, dims[prefix.partition(".")[0]], generator))

    path = other_checkpoint(loader.goldens, name, tmp_path, change)
    model = loader.load(name, {fields[s]: dim for s, dim in dims.items()}, path=path)
    assert [layer.fc1.out_features for layer in getattr(model, side).layers][1::2] == [hidden_dim] * (
        len(getattr(model, side).layers) // 2
    )
    assert not model.moe_layers()
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(CheckpointError, match="size mismatch"):
        loader.load(name, {**{fields[s]: dim for s, dim in dims.items()}, field: hidden_dim + 1}, path=path)


# --- where an override may stand


@pytest.mark.parametrize("name", ["lm_top2", "mt_plain", "mt_nllb_ws2"])
def test_an_override_may_be_nested(loader, name):
    nested = loader.logits(name, {"model": {"moe_top1_expert": True}})
    assert torch.equal(nested, loader.logits(name, {"moe_top1_expert": True}))
    with pytest.raises(UnsupportedFieldError, match="alibi"):
        loader.load(name, {"model": {"alibi": True}})


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_flag_stands_above_an_override_and_that_above_the_checkpoint(loader, name):
    def fraction(overrides, *flags) -> set[float]:
        model = loader.load(name, overrides, "--moe-gating", "static", *flags)
        return {layer.dispatcher.options.capacity_fraction for layer in model.moe_layers().values()}

    own = {"lm_top2": -1.0, "mt_plain": 1.0, "mt_nllb_ws2": 1.0}[name]
    override = {"moe_eval_capacity_token_fraction": 0.5}
    flag = ("--moe-eval-capacity-token-fraction", "0.125")
    assert fraction({}) == {own}
    assert fraction(override) == {0.5}
    assert fraction({}, *flag) == {0.125}
    assert fraction(override, *flag) == {0.125}


@pytest.mark.parametrize("field", ["alibi", "scale_heads_inside"])
def test_a_dense_checkpoint_is_refused_alike(loader, tmp_path, field):
    """Dense models of upstream's branches are served by the same tasks."""
    generator = torch.Generator().manual_seed(0)

    def change(model, prefixes, model_dim):
        for prefix in prefixes:
            for key in [key for key in model if key.startswith(f"{prefix}.moe_layer.")]:
                del model[key]
            model.update(dense(prefix, model_dim, 96, generator))

    path = other_checkpoint(loader.goldens, "mt_plain", tmp_path, change)
    no_experts = {"moe_freq": 0, "encoder_moe_freq": 0, "decoder_moe_freq": 0}
    loader.load("mt_plain", no_experts, path=path)
    with pytest.raises(UnsupportedFieldError, match=field):
        loader.load("mt_plain", {**no_experts, field: True}, path=path)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_model_that_was_trained_under_activation_checkpointing_is_served_without(loader, name):
    fields = {"checkpoint_activations": True, "offload_activations": True}
    model = loader.load(name, fields)
    assert not any(hasattr(module, "precheckpoint_forward") for module in model.modules())
    assert torch.equal(logits(model), loader.logits(name, {}))
