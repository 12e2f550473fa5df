"""The one table of checkpoint fields that might be served silently wrong: implemented, without effect, or refused.

Source: the fields that upstream's branches `moe` and `nllb` add to fairseq's transformers and that the release lacks.
"""

from __future__ import annotations

import sys
from typing import Any

from fairseq_moe_ext.checkpoints.moe_config import MoEModelFields
from fairseq_moe_ext.checkpoints.plain_config import shown

# refused at any other value than those given: field -> (values that are served, what it would change)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "alibi": ((False,), "attention biases in place of positions"),
    "use_stable_embedding": ((False,), "a layer norm inside the embedding"),
    "scale_heads_inside": ((False,), "head scales inside the attention"),
    "decoder_learned_sinusoidal": ((False,), "learned sinusoidal positions"),
    "dummy_a2a": ((False,), "an exchange between ranks that exchanges nothing"),
}

# the release has these, in dense models
REFUSED_WITH_EXPERTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "character_embeddings": ((False,), "embeddings made of characters"),
    "adaptive_input": ((False,), "embeddings of several sizes"),
    "quant_noise_scalar": ((0,), "linear maps in 8 bits, which experts do not have"),
    "base_layers": ((0,), "layers of another kind of experts, fairseq's own"),
}

# the release has these in decoders only, upstream in encoders too
REFUSED_WITH_ENCODER: dict[str, tuple[tuple[Any, ...], str]] = {
    "scale_attn": ((False,), "a layer norm after the encoder's attention"),
    "scale_fc": ((False,), "a layer norm inside the encoder's feed-forward"),
    "scale_heads": ((False,), "head scales in the encoder's attention"),
    "scale_resids": ((False,), "scaled residuals in the encoder"),
}

# known, and without effect on what a served model computes
WITHOUT_EFFECT = frozenset(
    {
        "moe_expert_ffn_dim",  # upstream defines it and reads --encoder-ffn-embed-dim
        "moe_local_drop",  # training only
        "use_tutel_moe",  # another implementation of the same mathematics
        "record_a2a_perf_stats",
        "moe_generation",  # upstream's way to give all ranks one batch
        "moe_cmr_xgpu",
        "moe_gate_loss_wt",
        "moe_gate_loss_combine_method",
        "moe_gate_loss_transform",
        "cmr_gate_loss_p",
        "cmr_gate_loss_wt",
        "cmr_log_lang_gates",
        "moe_report",
        "moe_trace",
        "moe_record",
        "moe_dtype",
        "moe_kernel",
        "moe_weights",
        "moe_weights_scope",
        "moe_report_weight_error",
        "moe_debug",
        "moe_second_choice_threshold",
        "moe_capacity_factor",  # these and below: how a checkpoint was once served, or not
        "moe_overflow",
        "moe_drop_metric",
        "moe_capacity_scope",
        "moe_capacity_phases",
        "moe_renormalize_after_drop",
        "moe_virtual_ranks",
        "moe_reroute_prefer",
    }
)

UNKNOWN_PREFIXES = ("moe_", "cmr_", "use_moe_", "encoder_moe_", "decoder_moe_")
DEFAULTS = (None, False, 0, "")


class UnsupportedFieldError(ValueError):
    """A checkpoint asks for mathematics that the plugin does not have."""


def check_fields(args: Any, has_encoder: bool, has_experts: bool = True) -> None:
    """Raise UnsupportedFieldError at the first field of a model's arguments that would be served wrong.

    args: the model's arguments as a mapping or an object with attributes.
    """
    values = dict(args) if hasattr(args, "keys") else dict(vars(args))
    refused = dict(REFUSED)
    if has_encoder:
        refused.update(REFUSED_WITH_ENCODER)
    if has_experts:
        refused.update(REFUSED_WITH_EXPERTS)
    for name, value in values.items():
        if name in refused:
            served, meaning = refused[name]
            if value is not None and value not in served:
                raise UnsupportedFieldError(
                    f"checkpoint field {name} ({meaning}) is not supported: it must be "
                    f"{' or '.join(map(str, served))}, got {shown(value)}"
                )
        elif _is_unknown(name) and value not in DEFAULTS:
            raise UnsupportedFieldError(
                f"checkpoint field {name} is unknown here and may change the results: it must be unset, "
                f"got {shown(value)}"
            )


def is_checked(name: str) -> bool:
    """Whether `check_fields` has something to say of a field."""
    return name in REFUSED or name in REFUSED_WITH_EXPERTS or name in REFUSED_WITH_ENCODER or _is_unknown(name)


def check_layer_options(cfg: Any, trains: bool) -> None:
    """ValueError at the first option of fairseq's own layers that does not reach layers with experts.

    cfg: fairseq's TransformerConfig. trains: whether the model is built to be trained.
    """
    options = {"quant-noise-scalar": cfg.quant_noise.scalar, "base-layers": cfg.base_layers}
    if trains:  # a trained model computes without it
        options["quant-noise-pq"] = cfg.quant_noise.pq
    for option, value in options.items():
        if value:
            raise ValueError(f"--{option} does not reach experts: it must be 0 with MoE layers, got {value}")
    wrapping = sys.modules.get("fairscale.nn.wrap.auto_wrap")
    if wrapping is not None and wrapping.ConfigAutoWrap.in_autowrap_context:
        raise ValueError("--ddp-backend fully_sharded cannot take apart layers with experts: it must be another one")


def _is_unknown(name: str) -> bool:
    known = name in MoEModelFields.__dataclass_fields__ or name in WITHOUT_EFFECT
    return name.startswith(UNKNOWN_PREFIXES) and not known
