"""The one table of what Hugging Face's config.json may say of an NLLB model, and what a fairseq model must be for it.

Each field is copied, must have one value, or changes nothing that a served model computes. A field that is in none of
the lists and named like a part of a model is refused at any value but an unset one: it may change the mathematics.

Source: transformers 4.57's `NllbMoeConfig`, `M2M100Config` and `PretrainedConfig`; fairseq's TransformerConfig and the
fields of upstream's branches (checkpoints/moe_config.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq_moe_ext.checkpoints.config_fields import MOST_POSITIONS
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.gating.routing import SECOND_EXPERT_POLICIES

# Hugging Face's name -> fairseq's, of the functions that both have. fairseq's swish fails in its dense layers
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "tanh": "tanh",
    "linear": "linear",
}
FAIRSEQ_ACTIVATIONS = {"gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}  # and the rest by the same name
DTYPES = ("float32", "float16", "bfloat16")
UNSET = (None, False, 0, "", [], {})


@dataclass(frozen=True)
class Rule:
    """text: what a value must be, as a message says it."""

    text: str
    fits: Callable[[Any], bool]


def _whole(least: int, most: int = (1 << 31) - 1) -> Rule:
    text = f"a whole number of at least {least}" + (f" and at most {most}" if most < (1 << 31) - 1 else "")
    return Rule(text, lambda value: type(value) is int and least <= value <= most)


def _one_of(*values: str) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


FLAG = Rule("true or false", lambda value: type(value) is bool)
NUMBER = Rule("a finite number", _is_number)
SHARE = Rule("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
POLICY = _one_of(*SECOND_EXPERT_POLICIES)

NEEDED = object()  # in the place of a default: the field must be there
# copied: field -> (its value where config.json lacks it, rule)
COPIED: dict[str, tuple[Any, Rule]] = {
    "vocab_size": (NEEDED, _whole(1)),
    "d_model": (NEEDED, _whole(1)),
    **{
        f"{side}_{name}": (NEEDED, rule)
        for side in ("encoder", "decoder")
        for name, rule in (("layers", _whole(1, 10_000)), ("ffn_dim", _whole(1)), ("attention_heads", _whole(1)))
    },
    "max_position_embeddings": (1024, _whole(1, MOST_POSITIONS)),
    "activation_function": ("relu", _one_of(*ACTIVATIONS)),
    "scale_embedding": (True, FLAG),
    "dropout": (0.1, SHARE),
    "attention_dropout": (0.1, SHARE),
    "activation_dropout": (0.0, SHARE),
    "encoder_layerdrop": (0.05, SHARE),
    "decoder_layerdrop": (0.05, SHARE),
}
COPIED_OF_EXPERTS: dict[str, tuple[Any, Rule]] = {
    "encoder_sparse_step": (4, _whole(0)),
    "decoder_sparse_step": (4, _whole(0)),
    "num_experts": (128, _whole(2, 100_000)),  # of which the gate chooses two
    "second_expert_policy": ("all", POLICY),
    "normalize_router_prob_before_dropping": (False, FLAG),
    "batch_prioritized_routing": (False, FLAG),
    "moe_eval_capacity_token_fraction": (1.0, NUMBER),
    "moe_token_dropout": (0.2, SHARE),
    "router_dtype": ("float32", _one_of(*DTYPES)),
    "router_ignore_padding_tokens": (False, FLAG),
}
# field -> (the only value that is served, why)
FIXED: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("tie_word_embeddings", "is_encoder_decoder"), (True, "NLLB has no other")),
    **dict.fromkeys(("is_decoder", "add_cross_attention", "tie_encoder_decoder"), (False, "NLLB has no other")),
    **dict.fromkeys(("cross_attention_hidden_size", "auto_map"), (None, "NLLB has no other")),
    "pruned_heads": ({}, "fairseq's attention has all its heads"),
    "quantization_config": (None, "the weights must be float ones"),
    "bos_token_id": (0, "fairseq's <s>"),
    "pad_token_id": (1, "fairseq's <pad>"),
    "eos_token_id": (2, "fairseq's </s>"),
    "decoder_start_token_id": (2, "fairseq begins with </s>"),
    "unk_token_id": (3, "fairseq's <unk>"),
}
FIXED_OF_EXPERTS: dict[str, tuple[Any, str]] = {
    "router_bias": (False, "fairseq's gate has none"),
    "router_type": ("tokens_masked", "NLLB has no other"),
    "moe_gating_use_fp32": (False, "the export writes it where router_dtype does not say it"),
}
# other names of the same field
SAME = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}

# what the export writes anew
WRITTEN = frozenset("architectures model_type transformers_version num_hidden_layers name_or_path".split())
# of no meaning to a served model, and not worth a word
BOOKKEEPING = WRITTEN | frozenset("torch_dtype dtype tokenizer_class use_cache attn_implementation".split())
# known, and without effect on what a served model computes: training's, generation's, and what tools note down
WITHOUT_EFFECT = frozenset(
    "expert_capacity init_std router_z_loss_coef router_aux_loss_coef router_jitter_noise "
    "output_router_logits classifier_dropout gradient_checkpointing "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens max_new_tokens "
    "return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss "
    "chunk_size_feed_forward finetuning_task id2label label2id task_specific_params problem_type prefix "
    "sep_token_id cls_token_id mask_token_id".split()
)
_PART_OF_A_MODEL = re.compile(
    "moe|rout|expert|gat(e|ing)|capacity|sparse|polic|choice|top_k|jitter|noise|norm|rms|eps|position|rope|rotary|theta"
    "|alibi|atten|attn|qkv|query|proj|head|embed|vocab|token|activ|glu|sigmoid|softmax|logit|scor|temper|clip|scal|bias"
    "|layer|block|mlp|ffn|feed_forward|hidden|dim|width|depth|conv|window|relative|causal|mask|parallel|share|tie|resid"
    "|drop|quant|lora|adapter|encoder|decoder"
)


def read_fields(config: Mapping[str, Any], has_experts: bool, source: str) -> dict[str, Any]:
    """Every copied field's value; CheckpointError, beginning with `source`, at the first that cannot be served right.

    has_experts: a dense model's code does not read the fields of experts.
    """
    copied = COPIED | (COPIED_OF_EXPERTS if has_experts else {})
    fixed = FIXED | (FIXED_OF_EXPERTS if has_experts else {})
    values = {}
    for name, (default, rule) in copied.items():
        if name not in config and default is NEEDED:
            raise CheckpointError(f"{source}: {name} must be there, {rule.text}")
        values[name] = config.get(name, default)
        if not rule.fits(values[name]):
            raise CheckpointError(f"{source}: {name} must be {rule.text}, got {values[name]!r:.80}")
    for name, value in config.items():
        if name in fixed:
            wanted, why = fixed[name]
            if value != wanted or type(value) is not type(wanted):
                raise CheckpointError(f"{source}: {name} must be {wanted}, {why}, got {value!r:.80}")
        elif name in SAME and value != values[SAME[name]]:
            raise CheckpointError(f"{source}: {name} must be {SAME[name]}, {values[SAME[name]]}, got {value!r:.80}")
        elif _may_matter(name) and value not in UNSET:
            raise CheckpointError(
                f"{source}: {name} is unknown here and may change the results: it must be unset, got {value!r:.80}"
            )
    for side in ("encoder", "decoder"):
        if values["d_model"] % values[f"{side}_attention_heads"]:
            raise CheckpointError(
                f"{source}: {side}_attention_heads must divide d_model, {values['d_model']}, got "
                f"{values[f'{side}_attention_heads']}"
            )
    return values


def dropped_fields(config: Mapping[str, Any], has_experts: bool) -> dict[str, Any]:
    """The fields that have no place in a fairseq model, as config.json has them."""
    known = {*COPIED, *FIXED, *SAME, *WRITTEN}
    known |= {*COPIED_OF_EXPERTS, *FIXED_OF_EXPERTS} if has_experts else set()
    return {name: value for name, value in config.items() if name not in known and not name.startswith("_")}


def _may_matter(name: str) -> bool:
    known = {*COPIED, *COPIED_OF_EXPERTS, *FIXED, *FIXED_OF_EXPERTS, *SAME, *BOOKKEEPING, *WITHOUT_EFFECT}
    return name not in known and not name.startswith("_") and _PART_OF_A_MODEL.search(name) is not None


# the other way: what a fairseq model must be, since Hugging Face's layout says nothing else (TransformerConfig's names)
FAIRSEQ_FIXED: dict[str, Any] = {
    **{
        f"{side}.{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            *(("normalize_before", True), ("learned_pos", False)),
            *(("layers_to_keep", None), ("xformers_att_config", None)),
        )
    },
    "share_all_embeddings": True,
    **dict.fromkeys(
        (
            *("no_token_positional_embeddings", "layernorm_embedding", "adaptive_input", "adaptive_softmax_cutoff"),
            *("char_inputs", "character_embeddings", "merge_src_tgt_embed", "no_cross_attention"),
            *("cross_self_attention", "no_decoder_final_norm", "base_layers", "decoder_learned_sinusoidal"),
            *("scale_attn", "scale_fc", "scale_heads", "scale_resids"),
            *("moe_cmr", "moe_top1_expert", "moe_fom", "moe_eval_capacity_max_seqlen"),
            *("alternate_ffn_embed_dim", "alternate_decoder_ffn_embed_dim"),
        ),
        False,
    ),
}
# two fields of fairseq's for which Hugging Face's layout has one
FAIRSEQ_EQUAL = (
    ("decoder.embed_dim", "encoder.embed_dim"),
    ("decoder.input_dim", "decoder.embed_dim"),
    ("decoder.output_dim", "decoder.embed_dim"),
    ("max_source_positions", "max_target_positions"),
)


def check_fairseq(value_of: Callable[[str], Any]) -> None:
    """CheckpointError, which names no file, at the first field that Hugging Face's layout cannot express.

    value_of: a field's value as serving uses it, by its name above.
    """
    for name, wanted in FAIRSEQ_FIXED.items():
        found = value_of(name)
        if (found not in UNSET) if not wanted else (found != wanted):
            raise CheckpointError(
                f"{name.replace('.', '_')} must be {wanted} in a model for Hugging Face's layout, got {found!r:.80}"
            )
    for name, other in FAIRSEQ_EQUAL:
        if value_of(name) != value_of(other):
            raise CheckpointError(
                f"{name.replace('.', '_')} must be {other.replace('.', '_')}, {value_of(other)}, in a model for "
                f"Hugging Face's layout, got {value_of(name)!r:.80}"
            )
    sizes, drops = ["encoder.embed_dim"], ["dropout", "attention_dropout", "activation_dropout", "relu_dropout"]
    for side in ("encoder", "decoder"):
        sizes += [f"{side}.layers", f"{side}.ffn_embed_dim", f"{side}.attention_heads"]
        drops.append(f"{side}.layerdrop")
    for name, rule in (
        *((name, _whole(1)) for name in sizes),
        *((name, SHARE) for name in drops if value_of(name) is not None),
        ("activation_fn", _one_of(*dict.fromkeys(ACTIVATIONS.values()), "gelu_fast")),
        *(("moe_second_expert_policy", POLICY), ("moe_eom", SHARE), ("moe_eval_capacity_token_fraction", NUMBER)),
        *(("max_target_positions", _whole(1)), ("moe_expert_count", _whole(0))),
    ):
        if not rule.fits(value_of(name)):
            raise CheckpointError(
                f"{name.replace('.', '_')} must be {rule.text} in a model for Hugging Face's layout, got "
                f"{value_of(name)!r:.80}"
            )
