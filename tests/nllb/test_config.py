"""The configuration between Hugging Face's layout and fairseq: exact field by field, or refused by name."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
from hf_makers import NLLB_54B
from hypothesis import given
from hypothesis import strategies as st
from model_makers import arguments

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.nllb.config import NllbConfig

DENSE = {key: value for key, value in NLLB_54B.items() if key not in ("encoder_sparse_step", "decoder_sparse_step")}
DENSE["model_type"] = "m2m_100"
SHARES = st.floats(0, 1, exclude_max=True)
FRACTIONS = st.sampled_from([0, 0.0, -1.0, 0.25, 1, 1.0, 2.5])
HF_CONFIGS = st.fixed_dictionaries(
    {name: st.just(value) for name, value in NLLB_54B.items()}
    | {f"{side}_{name}": values for side in ("encoder", "decoder") for name, values in (
        *(("layers", st.integers(1, 5)), ("ffn_dim", st.integers(1, 9)), ("attention_heads", st.sampled_from([1, 4]))),
        *(("sparse_step", st.integers(0, 6)), ("layerdrop", SHARES)),
    )}
    | {
        "vocab_size": st.integers(10, 99),
        "max_position_embeddings": st.integers(1, 99),
        "activation_function": st.sampled_from(["relu", "gelu", "gelu_new", "tanh", "linear"]),
        "num_experts": st.integers(2, 9),
        "second_expert_policy": st.sampled_from(["all", "sampling", "random"]),
        "router_dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
        "moe_eval_capacity_token_fraction": FRACTIONS,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "moe_token_dropout"), SHARES),
        **dict.fromkeys(
            ("scale_embedding", "normalize_router_prob_before_dropping", "batch_prioritized_routing",
             "router_ignore_padding_tokens"),
            st.booleans(),
        ),
    }
)  # fmt: skip


def through_fairseq(config: NllbConfig, args: Namespace | None = None) -> NllbConfig:
    """What the export makes of the arguments that the import writes; tensors of the configuration's own shape."""
    layers = {
        side: [number for number in range(config.side(side).layers) if config.side(side).is_moe_layer(number)]
        for side in ("encoder", "decoder")
    }
    experts = config.experts if config.has_moe_layers else 0
    args = config.to_fairseq() if args is None else args
    return NllbConfig.from_fairseq(args, layers, config.vocabulary, experts, config.router_dtype)


@given(HF_CONFIGS)
def test_there_and_back_is_exact_field_by_field(hf):
    config = NllbConfig.from_hf(hf, "config.json")
    assert NllbConfig.from_hf(config.to_hf(), "") == config
    assert through_fairseq(config) == config
    back = through_fairseq(config).to_hf()
    meant = {name for name in hf if name in back} - {"num_hidden_layers"}  # transformers counts no layers by it
    assert {name: back[name] for name in meant} == {name: hf[name] for name in meant}
    assert vars(through_fairseq(config).to_fairseq()) == vars(config.to_fairseq())


@given(
    st.fixed_dictionaries(
        {"moe_freq": st.integers(1, 4), "moe_expert_count": st.integers(2, 8)},
        optional={
            "moe_eval_capacity_token_fraction": FRACTIONS | st.none(),
            "moe_eom": SHARES | st.none(),
            "moe_second_expert_policy": st.sampled_from(["all", "sampling", "random", None]),
            "activation_fn": st.sampled_from(["relu", "gelu", "gelu_accurate", "tanh", None]),
            "max_target_positions": st.just(1024) | st.none(),
            **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), SHARES),
            **dict.fromkeys(
                ("moe_gating_use_fp32", "moe_normalize_gate_prob_before_dropping", "moe_batch_prioritized_routing",
                 "use_moe_pad_mask", "no_scale_embedding"),
                st.booleans() | st.none(),
            ),
        },
    )
)  # fmt: skip
def test_what_serving_reads_comes_back_from_hugging_faces_layout(fields):
    args = Namespace(
        **{f"{side}_normalize_before": True for side in ("encoder", "decoder")}, share_all_embeddings=True, **fields
    )
    layers = dict.fromkeys(("encoder", "decoder"), list(range(args.moe_freq - 1, 6, args.moe_freq)))
    found = NllbConfig.from_fairseq(args, layers, 50, args.moe_expert_count, "float32")
    back = NllbConfig.from_hf(json.loads(json.dumps(found.to_hf())), "").to_fairseq()
    wanted = MoEConfig.from_args(args)
    for name in MoEConfig.__dataclass_fields__:
        assert getattr(MoEConfig.from_args(back), name) == getattr(wanted, name), name
    assert back.activation_fn == (getattr(args, "activation_fn", None) or "relu")
    assert back.no_scale_embedding is bool(getattr(args, "no_scale_embedding", False))
    for name, default in (("dropout", 0.1), ("attention_dropout", 0.0), ("activation_dropout", 0.0)):
        assert getattr(back, name) == getattr(args, name, default), name


@pytest.mark.parametrize(
    "given_value, written", [(0.0, 0.0), (-1.0, -1.0), (None, 0.25), ("missing", 0.25), (0.5, 0.5)]
)
def test_the_exported_capacity_is_the_one_that_serving_uses(given_value, written):
    args = NllbConfig.from_hf(NLLB_54B, "").to_fairseq()
    args.moe_eval_capacity_token_fraction = given_value
    if given_value == "missing":
        del args.moe_eval_capacity_token_fraction
    config = through_fairseq(NllbConfig.from_hf(NLLB_54B, ""), args)
    assert config.to_hf()["moe_eval_capacity_token_fraction"] == written
    assert MoEConfig.from_args(args).moe_eval_capacity_token_fraction == written


@pytest.mark.parametrize("router_ignore", [False, True])
def test_padding_that_the_router_does_not_ignore_takes_slots(router_ignore):
    """transformers masks the padding's choices unless router_ignore_padding_tokens is set."""
    args = NllbConfig.from_hf({**NLLB_54B, "router_ignore_padding_tokens": router_ignore}, "").to_fairseq()
    assert MoEConfig.from_args(args).use_moe_pad_mask is not router_ignore


class TestRefusedOnTheWayIn:
    @pytest.mark.parametrize(
        "field, value",
        [
            *(("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 3), ("decoder_start_token_id", 250_004)),
            *(("decoder_start_token_id", None), ("unk_token_id", 0), ("bos_token_id", False)),
            *(("second_expert_policy", "best"), ("second_expert_policy", None), ("second_expert_policy", ["all"])),
            *(("activation_function", "mish"), ("activation_function", "silu"), ("activation_function", None)),
            *(("router_bias", True), ("router_bias", None), ("router_dtype", "float64"), ("router_dtype", None)),
            *(("router_ignore_padding_tokens", "yes"), ("router_ignore_padding_tokens", None)),
            *(("moe_token_dropout", 1.0), ("moe_token_dropout", -0.1), ("moe_token_dropout", None)),
            *(("moe_token_dropout", float("nan")), ("moe_eval_capacity_token_fraction", None)),
            *(("moe_eval_capacity_token_fraction", float("inf")), ("moe_eval_capacity_token_fraction", "0.25")),
            *(("scale_embedding", "false"), ("scale_embedding", 0), ("normalize_router_prob_before_dropping", 1)),
            *(("batch_prioritized_routing", "no"), ("encoder_sparse_step", 2.5), ("decoder_sparse_step", -1)),
            *(("encoder_sparse_step", None), ("num_experts", 1), ("num_experts", True), ("num_experts", "8")),
            *(("d_model", 0), ("d_model", 16.0), ("encoder_layers", None), ("vocab_size", True)),
            *(
                ("encoder_attention_heads", 3),
                ("max_position_embeddings", 0),
                ("dropout", 2),
                ("decoder_layerdrop", "0"),
            ),
            *(("tie_word_embeddings", False), ("is_encoder_decoder", False), ("is_decoder", True)),
            *(("add_cross_attention", True), ("tie_encoder_decoder", True), ("pruned_heads", {"1": [0]})),
            *(("quantization_config", {"load_in_8bit": True}), ("auto_map", {"AutoModel": "modeling.Mine"})),
            *(("hidden_size", 32), ("num_attention_heads", 4)),
            # no field of transformers': a later version's, or another's
            *(("router_top_k", 1), ("num_experts_per_tok", 1), ("num_shared_experts", 1), ("layer_norm_eps", 1e-3)),
            *(("position_embedding_type", "rotary"), ("rope_theta", 1e4), ("final_norm", "rms")),
            *(("router_type", "expert_choice"), ("moe_capacity_factor", 1.5), ("attention_bias", True)),
            *(("embedding_multiplier", 12.0), ("gating_function", "sigmoid"), ("expert_bias", [0.1])),
            *(("mlp_type", "swiglu"), ("clip_qkv", 8.0), ("final_logit_softcapping", 30.0), ("rms_eps", 1e-6)),
        ],
    )
    def test_refused_fields_are_named_before_a_weight_is_read(self, field, value):
        with pytest.raises(CheckpointError, match=rf"^config\.json: {field} ") as caught:
            NllbConfig.from_hf({**NLLB_54B, field: value}, "config.json")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("field", ["d_model", "decoder_ffn_dim", "vocab_size"])
    def test_missing_sizes_are_named(self, field):
        with pytest.raises(CheckpointError, match=f"^config.json: {field} must be there"):
            NllbConfig.from_hf({name: value for name, value in NLLB_54B.items() if name != field}, "config.json")

    @pytest.mark.parametrize(
        "field, value",
        [
            *(("router_jitter_noise", 0.01), ("expert_capacity", None), ("forced_bos_token_id", 250_004)),
            *(
                ("num_beams", 5),
                ("unsloth_version", "2025.1"),
                ("use_cache", False),
                ("transformers.js_config", {"a": 1}),
                ("_attn_implementation_autoset", True),
            ),
            *(("hidden_size", 16), ("new_router_flag", False), ("router_type", "tokens_masked"), ("dtype", "float32")),
        ],
    )
    def test_what_changes_nothing_is_taken(self, field, value):
        assert NllbConfig.from_hf({**NLLB_54B, field: value}, "") == NllbConfig.from_hf(NLLB_54B, "")

    def test_fields_that_a_dense_models_code_does_not_read_are_taken(self):
        config = NllbConfig.from_hf({**DENSE, "router_bias": True, "second_expert_policy": "best"}, "")
        assert config == NllbConfig.from_hf(DENSE, "") and config.is_dense


class TestRefusedOnTheWayOut:
    @pytest.mark.parametrize(
        "field, value",
        [
            *(("encoder_normalize_before", False), ("decoder_normalize_before", False)),
            *(("encoder_learned_pos", True), ("decoder_learned_pos", True), ("no_token_positional_embeddings", True)),
            *(("share_all_embeddings", False), ("layernorm_embedding", True), ("adaptive_softmax_cutoff", "10,20")),
            *(("adaptive_input", True), ("no_cross_attention", True), ("cross_self_attention", True)),
            *(("no_decoder_final_norm", True), ("base_layers", 1), ("decoder_output_dim", 8), ("decoder_input_dim", 8)),
            *(("decoder_embed_dim", 8), ("encoder_layers_to_keep", "0,1"), ("max_source_positions", 0)),
            *(("moe_cmr", True), ("moe_top1_expert", True), ("moe_fom", 0.1), ("moe_eom", 1.0)),
            *(("moe_eval_capacity_max_seqlen", True), ("alternate_ffn_embed_dim", 8)),
            *(("alternate_decoder_ffn_embed_dim", 8), ("moe_second_expert_policy", "best")),
            *(("activation_fn", "swish"), ("activation_fn", "relu_squared"), ("alibi", True)),
            *(("scale_attn", True), ("scale_fc", True), ("scale_heads", True), ("scale_resids", True)),
            *(("use_stable_embedding", True), ("decoder_learned_sinusoidal", True), ("character_embeddings", True)),
            *(("encoder_layers", "2"), ("decoder_ffn_embed_dim", 0), ("encoder_attention_heads", None)),
            *(("dropout", "0.1"), ("encoder_layerdrop", 2), ("moe_expert_count", "many")),
            *(("moe_of_tomorrow", 3), ("moe_eval_capacity_token_fraction", float("nan"))),
        ],
    )
    def test_refused_fields_are_named(self, field, value):
        config = NllbConfig.from_hf(NLLB_54B, "")
        args = config.to_fairseq()
        setattr(args, field, value)
        with pytest.raises(CheckpointError, match=field) as caught:
            through_fairseq(config, args)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [3, {"of": 1}, [1]])
    def test_arguments_of_no_transformer(self, value):
        config = NllbConfig.from_hf(NLLB_54B, "")
        with pytest.raises(CheckpointError, match="its arguments must be a transformer's"):
            through_fairseq(config, Namespace(**vars(config.to_fairseq()), encoder=value))

    def test_what_fairseq_takes_where_the_checkpoint_says_nothing_counts(self):
        with pytest.raises(CheckpointError, match="encoder_normalize_before must be True"):
            NllbConfig.from_fairseq(
                Namespace(share_all_embeddings=True), {"encoder": [], "decoder": []}, 9, 0, "float32"
            )

    def test_the_published_architecture_is_expressed(self):
        args = arguments("moe_transformer_nllb_54b")
        layers = dict.fromkeys(("encoder", "decoder"), list(range(3, 24, 4)))
        hf = NllbConfig.from_fairseq(args, layers, 256206, 128, "float16").to_hf()
        wanted = {"num_experts": 128, "moe_token_dropout": 0.2, "encoder_sparse_step": 4, "d_model": 2048}
        assert {name: hf[name] for name in wanted} == wanted and hf["router_dtype"] == "float32"
