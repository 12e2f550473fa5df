"""What an NLLB model is: its sizes and its routing, read from and written to both worlds' configurations.

Hugging Face: `config.json` of the model types `nllb-moe` and, for the dense ones, `m2m_100`. fairseq: a Namespace of
model arguments as upstream's branch `nllb` names them.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from fairseq_moe_ext.serving.errors import CheckpointError

MOE_TYPE, DENSE_TYPE = "nllb-moe", "m2m_100"
SIDES = ("encoder", "decoder")
MAX_POSITIONS = 1024


@dataclass(frozen=True)
class Side:
    """Of the encoder or the decoder. freq: every freq-th layer is a MoE layer; 0: none."""

    layers: int
    hidden_dim: int
    heads: int
    freq: int

    def is_moe_layer(self, number: int) -> bool:
        return self.freq > 0 and (number + 1) % self.freq == 0


@dataclass(frozen=True)
class NllbConfig:
    """experts: in each MoE layer, 0 in a dense model. output_masking: upstream's moe_eom."""

    vocabulary: int
    model_dim: int
    encoder: Side
    decoder: Side
    experts: int = 0
    max_positions: int = MAX_POSITIONS
    activation: str = "relu"
    scale_embedding: bool = True
    second_expert_policy: str = "all"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    capacity_fraction: float = 1.0
    gating_fp32: bool = True
    output_masking: float = 0.0

    @property
    def is_dense(self) -> bool:
        return self.experts == 0

    def side(self, name: str) -> Side:
        return self.encoder if name == "encoder" else self.decoder

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str) -> NllbConfig:
        """`config`: config.json's content; CheckpointError, beginning with `source`, where it is no NLLB model."""
        kind = config.get("model_type")
        if kind not in (MOE_TYPE, DENSE_TYPE):
            raise CheckpointError(f"{source}: model_type must be {MOE_TYPE} or {DENSE_TYPE}, got {kind!r}")
        for field, value in (("router_bias", False), ("tie_word_embeddings", True)):
            if config.get(field, value) != value:
                raise CheckpointError(f"{source}: {field} must be {value}, fairseq has no other, got {config[field]!r}")
        sides = {}
        for side in SIDES:
            freq = int(config.get(f"{side}_sparse_step", 4)) if kind == MOE_TYPE else 0
            sizes = (_number(config, f"{side}_{name}", source) for name in ("layers", "ffn_dim", "attention_heads"))
            sides[side] = Side(*sizes, freq=freq)
        has_experts = any(side.is_moe_layer(number) for side in sides.values() for number in range(side.layers))
        return cls(
            vocabulary=_number(config, "vocab_size", source),
            model_dim=_number(config, "d_model", source),
            **sides,
            experts=_number({"num_experts": 128, **config}, "num_experts", source) if has_experts else 0,
            max_positions=int(config.get("max_position_embeddings", MAX_POSITIONS)),
            activation=str(config.get("activation_function", "relu")),
            scale_embedding=bool(config.get("scale_embedding", True)),
            second_expert_policy=str(config.get("second_expert_policy", "all")),
            normalize_before_dropping=bool(config.get("normalize_router_prob_before_dropping", False)),
            batch_prioritized=bool(config.get("batch_prioritized_routing", False)),
            capacity_fraction=float(config.get("moe_eval_capacity_token_fraction", 1.0)),
            gating_fp32=config.get("router_dtype", "float32") == "float32",
            output_masking=float(config.get("moe_token_dropout", 0.2)) if has_experts else 0.0,
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json's content."""
        config: dict[str, Any] = {
            "architectures": ["M2M100ForConditionalGeneration" if self.is_dense else "NllbMoeForConditionalGeneration"],
            "model_type": DENSE_TYPE if self.is_dense else MOE_TYPE,
            "vocab_size": self.vocabulary,
            "d_model": self.model_dim,
            "num_hidden_layers": self.encoder.layers,
            "max_position_embeddings": self.max_positions,
            "activation_function": self.activation,
            "scale_embedding": self.scale_embedding,
            "tie_word_embeddings": True,
            **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
            "is_encoder_decoder": True,
            "use_cache": True,
        }
        for name in SIDES:
            side = self.side(name)
            config |= {f"{name}_layers": side.layers, f"{name}_ffn_dim": side.hidden_dim}
            config |= {f"{name}_attention_heads": side.heads, f"{name}_layerdrop": 0.0}
            if not self.is_dense:
                config[f"{name}_sparse_step"] = side.freq
        if not self.is_dense:
            config |= {
                "num_experts": self.experts,
                "second_expert_policy": self.second_expert_policy,
                "normalize_router_prob_before_dropping": self.normalize_before_dropping,
                "batch_prioritized_routing": self.batch_prioritized,
                "moe_eval_capacity_token_fraction": self.capacity_fraction,
                "moe_token_dropout": self.output_masking,
                "router_dtype": "float32" if self.gating_fp32 else "float16",
                "router_bias": False,
            }
        return config

    @classmethod
    def from_fairseq(cls, args: Namespace, sides: dict[str, Side], vocabulary: int, experts: int) -> NllbConfig:
        """args: the model's arguments; the rest as the checkpoint's tensors say it.

        CheckpointError where the model is not of NLLB's kind: pre-norm, sinusoidal positions, all embeddings shared.
        """
        rules: list[tuple[str, Any]] = []
        for side in SIDES:
            rules += [(f"{side}_normalize_before", True), (f"{side}_learned_pos", False)]
        rules += [("share_all_embeddings", True), ("no_token_positional_embeddings", False)]
        rules += [("layernorm_embedding", False), ("moe_cmr", False), ("moe_top1_expert", False), ("moe_fom", 0)]
        for field, value in rules:
            if (getattr(args, field, None) or False) != value:
                found = getattr(args, field, None)
                raise CheckpointError(f"{field} must be {value} in a model for Hugging Face's layout, got {found!r}")
        return cls(
            vocabulary=vocabulary,
            model_dim=args.encoder_embed_dim,
            **sides,
            experts=experts,
            max_positions=int(getattr(args, "max_target_positions", None) or MAX_POSITIONS),
            activation=str(getattr(args, "activation_fn", None) or "relu"),
            scale_embedding=not getattr(args, "no_scale_embedding", False),
            second_expert_policy=str(getattr(args, "moe_second_expert_policy", None) or "sampling"),
            normalize_before_dropping=bool(getattr(args, "moe_normalize_gate_prob_before_dropping", False)),
            batch_prioritized=bool(getattr(args, "moe_batch_prioritized_routing", False)),
            capacity_fraction=float(getattr(args, "moe_eval_capacity_token_fraction", None) or 1.0),
            gating_fp32=bool(getattr(args, "moe_gating_use_fp32", False)),
            output_masking=float(getattr(args, "moe_eom", None) or 0.0),
        )

    def to_fairseq(self) -> Namespace:
        """The model's arguments as upstream's branch `nllb` would have saved them."""
        args = {
            "arch": "transformer" if self.is_dense else "moe_transformer",
            "activation_fn": self.activation,
            "no_scale_embedding": not self.scale_embedding,
            "share_all_embeddings": True,
            "max_source_positions": self.max_positions,
            "max_target_positions": self.max_positions,
            **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        }
        for name in SIDES:
            side = self.side(name)
            args |= {f"{name}_layers": side.layers, f"{name}_embed_dim": self.model_dim}
            args |= {f"{name}_ffn_embed_dim": side.hidden_dim, f"{name}_attention_heads": side.heads}
            args |= {f"{name}_normalize_before": True, f"{name}_learned_pos": False}
            if not self.is_dense:
                args[f"{name}_moe_freq"] = side.freq
        if not self.is_dense:
            args |= {
                "moe_freq": self.encoder.freq if self.encoder.freq == self.decoder.freq else 0,
                "moe_expert_count": self.experts,
                "moe_gating_use_fp32": self.gating_fp32,
                "moe_second_expert_policy": self.second_expert_policy,
                "moe_normalize_gate_prob_before_dropping": self.normalize_before_dropping,
                "moe_batch_prioritized_routing": self.batch_prioritized,
                "moe_eval_capacity_token_fraction": self.capacity_fraction,
                "moe_eom": self.output_masking,
                "use_moe_pad_mask": True,
            }
        return Namespace(**args)


def _number(config: dict[str, Any], field: str, source: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source}: {field} must be a whole number of at least 1, got {value!r}")
    return value
