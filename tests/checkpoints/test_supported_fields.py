"""Every field of a checkpoint that changes the mathematics is served, or refused by its name; one test per field.

Each goes the way of a user: a checkpoint, `--model-overrides`, fairseq's loader, the plugin's task.
"""

from dataclasses import dataclass, field

import pytest
import torch
from served_models import EVERY_MODEL, Loader

from fairseq_moe_ext.checkpoints import supported_fields
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.moe_config import MoEModelFields
from fairseq_moe_ext.checkpoints.supported_fields import UnsupportedFieldError

SCARCE = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.05")


@pytest.fixture(scope="module")
def loader(shared_goldens) -> Loader:
    return Loader(shared_goldens)


# --- refused


# every field once, of one model; and every model by a field
@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("lm_top2", field) for field in supported_fields.REFUSED),
        *(("mt_plain", field) for field in supported_fields.REFUSED_WITH_ENCODER),
        *((name, next(iter(supported_fields.REFUSED))) for name in EVERY_MODEL if name != "lm_top2"),
    ],
)
def test_a_field_without_an_implementation_is_refused_by_name(loader, name, field):
    with pytest.raises(UnsupportedFieldError) as caught:
        loader.load(name, {field: True})
    message = str(caught.value)
    assert f"checkpoint field {field} " in message
    assert "must be False" in message
    assert "got True" in message


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("value", [False, None, 0])
def test_refused_fields_at_their_defaults_are_served(loader, name, value):
    fields = dict.fromkeys(supported_fields.REFUSED, value)
    if value is not None:  # fairseq's own dataclass takes no None
        fields.update(dict.fromkeys(supported_fields.REFUSED_WITH_ENCODER, value))
    assert torch.equal(loader.logits(name, fields), loader.logits(name, {}))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("lm_top2", *each) for each in (("moe_whatever", 3), ("cmr_whatever", True), ("use_moe_whatever", "yes"))),
        *((name, "decoder_moe_whatever", 0.5) for name in EVERY_MODEL),
    ],
)
def test_an_unknown_field_at_a_value_is_refused(loader, name, field, value):
    with pytest.raises(UnsupportedFieldError) as caught:
        loader.load(name, {field: value})
    message = str(caught.value)
    assert f"checkpoint field {field} " in message
    assert "must be unset" in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize("name", ["lm_top2", "mt_plain"])
@pytest.mark.parametrize("value", [False, 0, 0.0, None, ""])
def test_an_unknown_field_at_its_default_is_served(loader, name, value):
    assert torch.equal(loader.logits(name, {"moe_whatever": value}), loader.logits(name, {}))


# --- without effect


@pytest.mark.parametrize(("name", "value"), [("lm_top2", "odd"), ("mt_plain", 17)])
def test_fields_without_effect_change_nothing_at_odd_values(loader, name, value):
    fields = dict.fromkeys(supported_fields.WITHOUT_EFFECT, value)
    assert torch.equal(loader.logits(name, fields, *SCARCE), loader.logits(name, {}, *SCARCE))


# --- implemented


@dataclass(frozen=True)
class Effect:
    """A field at another value than the checkpoint's, and what it must do on which model."""

    field: str
    value: object
    models: tuple[str, ...]
    changes: bool
    flags: tuple = SCARCE
    also: dict = field(default_factory=dict)  # overrides in both runs


BOTH = ("lm_top2", "mt_plain")
EFFECTS = [
    # the keys of the state say where the MoE layers are
    *(Effect(name, 7, BOTH, False) for name in ("moe_freq", "encoder_moe_freq", "decoder_moe_freq")),
    Effect("moe_expert_count", 8, BOTH, False),
    Effect("moe_gating_use_fp32", False, BOTH, False),
    Effect("moe_gating_use_fp32", False, BOTH, True, (*SCARCE, "--moe-dtype", "bfloat16")),
    Effect("moe_second_expert_policy", "sampling", BOTH, True, ()),
    Effect("moe_second_expert_policy", "random", BOTH, True, ()),
    Effect("moe_normalize_gate_prob_before_dropping", True, ("lm_top2", "mt_nllb_ws2"), True),
    Effect("moe_normalize_gate_prob_before_dropping", True, ("lm_top2", "mt_nllb_ws2"), False, ()),
    Effect("moe_top1_expert", True, BOTH, True, ()),
    Effect("moe_eval_capacity_token_fraction", 0.03, BOTH, True, ("--moe-gating", "static")),
    Effect("moe_eval_capacity_token_fraction", 0.03, BOTH, False, ()),
    Effect("moe_eval_capacity_max_seqlen", True, BOTH, True),
    Effect("moe_eval_capacity_max_seqlen", True, BOTH, False, ()),
    Effect("moe_normalize_expert_grad", "world_size", BOTH, False),
    Effect("use_moe_pad_mask", True, ("lm_top2",), True, (*SCARCE[:-1], "0.15")),
    Effect("use_moe_pad_mask", False, ("mt_plain",), True),
    Effect("moe_batch_prioritized_routing", True, BOTH, True),
    Effect("moe_batch_prioritized_routing", True, BOTH, False, ()),
    Effect("moe_eom", 0.3, BOTH, True, ()),
    Effect("moe_fom", 0.3, BOTH, True, ()),
    Effect("cmr_gate_drop", 0.9, BOTH, False, ()),
    Effect("moe_gating", "static", BOTH, False, (), {"moe_eval_capacity_token_fraction": 0.05}),  # the flag's alone
    Effect("batch_size", 50, BOTH, False),
    Effect("batch_size_valid", 50, BOTH, False),
]
ELSEWHERE = {"moe_cmr", "alternate_ffn_embed_dim", "alternate_decoder_ffn_embed_dim"}  # they need other weights


def test_every_implemented_field_has_a_test():
    assert {effect.field for effect in EFFECTS} | ELSEWHERE == set(MoEModelFields.__dataclass_fields__) - {"_name"}


@pytest.mark.parametrize(
    ("effect", "name"),
    [
        pytest.param(effect, name, id=f"{name}-{effect.field}-{effect.value}-{'x' if effect.changes else 'same'}")
        for effect in EFFECTS
        for name in effect.models
    ],
)
def test_an_implemented_field_has_its_effect(loader, effect, name):
    before = loader.logits(name, effect.also, *effect.flags)
    after = loader.logits(name, {**effect.also, effect.field: effect.value}, *effect.flags)
    assert torch.isfinite(after).all()
    if effect.changes:
        assert (after - before).abs().max() > 1e-3
    else:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_expert_output_masking_scales_what_the_experts_give(loader):
    """fom on top of eom is the product of both shares, and the order is of no account."""
    both = loader.logits("mt_plain", {"moe_eom": 0.2, "moe_fom": 0.3})
    torch.testing.assert_close(both, loader.logits("mt_plain", {"moe_eom": 0.3, "moe_fom": 0.2}))
    torch.testing.assert_close(both, loader.logits("mt_plain", {"moe_eom": 1 - 0.8 * 0.7}))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("count", [4, 16])
def test_an_expert_count_that_the_gates_do_not_have_is_refused(loader, name, count):
    with pytest.raises(CheckpointError, match=f"moe_expert_count must be .* 8, got {count}"):
        loader.load(name, {"moe_expert_count": count})


@pytest.mark.parametrize("name", BOTH)
def test_an_unknown_policy_is_refused(loader, name):
    with pytest.raises(ValueError, match="second_expert_policy must be one of all, sampling, random, got 'best'"):
        loader.load(name, {"moe_second_expert_policy": "best"})
