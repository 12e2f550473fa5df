"""What an NLLB model is: its sizes and its routing, read from and written to both worlds' configurations.

Hugging Face: `config.json` of the model types `nllb-moe` and, for the dense ones, `m2m_100`. fairseq: a Namespace of
model arguments as upstream's branch `nllb` names them. Which fields there are and what they may be: nllb_fields.py.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer.transformer_legacy import base_architecture

from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.checkpoints.supported_fields import check_fields
from fairseq_moe_ext.nllb.fields import ACTIVATIONS, FAIRSEQ_ACTIVATIONS, check_fairseq, read_fields

MOE_TYPE, DENSE_TYPE = "nllb-moe", "m2m_100"
SIDES = ("encoder", "decoder")
_GATING = "moe_gating_use_fp32"  # ours, in config.json
DEFAULT_MAX_POSITIONS = 1024  # fairseq's
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")  # both worlds' names
LAYERDROPS = ("encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class Side:
    """Of the encoder or the decoder. freq: every freq-th layer is a MoE layer; 0: none."""

    layers: int
    hidden_dim: int
    heads: int
    freq: int

    def is_moe_layer(self, number: int) -> bool:
        """Whether layer `number`, counted from 0, is a MoE layer."""
        return self.freq > 0 and (number + 1) % self.freq == 0


@dataclass(frozen=True)
class NllbConfig:
    """What both worlds' configurations say, by the former's values (`activation`: Hugging Face's name).

    experts: in each MoE layer. is_dense: without the fields of experts, of the model type `m2m_100`. output_masking:
    upstream's moe_eom. gating_fp32: the gate's softmax is computed in float32 whatever the model's dtype.
    padding_takes_slots: under a finite capacity. dropouts: values of DROPOUTS and LAYERDROPS.
    """

    vocabulary: int
    model_dim: int
    encoder: Side
    decoder: Side
    is_dense: bool = False
    experts: int = 0
    max_positions: int = 1024
    activation: str = "relu"
    scale_embedding: bool = True
    second_expert_policy: str = "all"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    capacity_fraction: float = 1.0
    router_dtype: str = "float32"
    gating_fp32: bool = True
    output_masking: float = 0.0
    padding_takes_slots: bool = False
    dropouts: tuple[float, ...] = (0.0,) * (len(DROPOUTS) + len(LAYERDROPS))

    def side(self, name: str) -> Side:
        """The side called `name`, `encoder` or `decoder`."""
        return self.encoder if name == "encoder" else self.decoder

    def check_counts(self, tensors: int) -> None:
        """CheckpointError, which names no file, where `tensors` are too few for so many layers or experts."""
        for name, count in (
            *((f"{name}_layers", self.side(name).layers) for name in SIDES),
            ("num_experts", self.experts if self.has_moe_layers else 0),
        ):
            if count > tensors:
                raise CheckpointError(f"{name} must be at most the number of tensors, {tensors}, got {count}")

    @property
    def has_moe_layers(self) -> bool:
        """Whether any layer of either side is one."""
        return any(0 < side.freq <= side.layers for side in (self.encoder, self.decoder))

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str) -> NllbConfig:
        """`config`: config.json's content; CheckpointError, beginning with `source`, where it is no NLLB model."""
        kind = config.get("model_type")
        if kind not in (MOE_TYPE, DENSE_TYPE):
            raise CheckpointError(f"{source}: model_type must be {MOE_TYPE} or {DENSE_TYPE}, got {kind!r:.80}")
        is_dense = kind == DENSE_TYPE
        values = read_fields(config, not is_dense, source)
        sides = {
            side: Side(
                *(values[f"{side}_{name}"] for name in ("layers", "ffn_dim", "attention_heads")),
                freq=0 if is_dense else values[f"{side}_sparse_step"],
            )
            for side in SIDES
        }
        shared = {
            "vocabulary": values["vocab_size"],
            "model_dim": values["d_model"],
            "is_dense": is_dense,
            "max_positions": values["max_position_embeddings"],
            "activation": values["activation_function"],
            "scale_embedding": values["scale_embedding"],
            "dropouts": tuple(float(values[name]) for name in (*DROPOUTS, *LAYERDROPS)),
        }
        if is_dense:
            return cls(**shared, **sides)
        return cls(
            **shared,
            **sides,
            experts=values["num_experts"],
            second_expert_policy=values["second_expert_policy"],
            normalize_before_dropping=values["normalize_router_prob_before_dropping"],
            batch_prioritized=values["batch_prioritized_routing"],
            capacity_fraction=float(values["moe_eval_capacity_token_fraction"]),
            router_dtype=values["router_dtype"],
            gating_fp32=values["router_dtype"] == "float32" and config.get(_GATING, True),
            output_masking=float(values["moe_token_dropout"]),
            padding_takes_slots=values["router_ignore_padding_tokens"],
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
            **dict(zip((*DROPOUTS, *LAYERDROPS), self.dropouts, strict=True)),
        }
        for name in SIDES:
            side = self.side(name)
            config |= {f"{name}_layers": side.layers, f"{name}_ffn_dim": side.hidden_dim}
            config |= {f"{name}_attention_heads": side.heads}
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
                "router_dtype": self.router_dtype,
                "router_bias": False,
                "router_ignore_padding_tokens": self.padding_takes_slots,
            }
            if self.router_dtype == "float32" and not self.gating_fp32:
                config[_GATING] = False
        return config

    @classmethod
    def from_fairseq(
        cls, args: Namespace, moe_layers: Mapping[str, list[int]], vocabulary: int, experts: int, dtype: str
    ) -> NllbConfig:
        """args: the model's arguments, read as serving reads them; the rest as the checkpoint's tensors say it.

        moe_layers: the numbers of each side's MoE layers; experts: in each, 0 without. dtype: of the weights that go
        with it. CheckpointError, which names no file, where Hugging Face's layout cannot express the model.
        """
        try:
            check_fields(args, has_encoder=True, has_experts=experts > 0)
            moe = MoEConfig.from_args(args)
            args = Namespace(**vars(args))
            base_architecture(args)  # what fairseq takes where the checkpoint says nothing
            cfg = TransformerConfig.from_namespace(args)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"its arguments must be a transformer's: {one_line(error)}") from error
        check_fairseq(lambda name: _served_value(cfg, moe, name))
        experts = experts if experts > 0 else moe.moe_expert_count  # of layers that are all dense
        shared = {
            "vocabulary": vocabulary,
            "model_dim": cfg.encoder.embed_dim,
            "max_positions": _served_value(cfg, moe, "max_target_positions"),
            "activation": _hf_activation(_served_value(cfg, moe, "activation_fn")),
            "scale_embedding": not cfg.no_scale_embedding,
            "dropouts": tuple(
                float(value or 0)
                for value in (
                    *(cfg.dropout, cfg.attention_dropout, cfg.activation_dropout or cfg.relu_dropout),
                    *(cfg.encoder.layerdrop, cfg.decoder.layerdrop),
                )
            ),
        }
        for name in SIDES:
            half = getattr(cfg, name)
            freq = _freq(getattr(moe, f"{name}_moe_freq"), moe_layers[name], half.layers, name) if experts else 0
            shared[name] = Side(half.layers, half.ffn_embed_dim, half.attention_heads, freq)
        if not experts:
            return cls(**shared, is_dense=True)
        return cls(
            **shared,
            experts=experts,
            second_expert_policy=moe.moe_second_expert_policy,
            normalize_before_dropping=bool(moe.moe_normalize_gate_prob_before_dropping),
            batch_prioritized=bool(moe.moe_batch_prioritized_routing),
            capacity_fraction=float(moe.moe_eval_capacity_token_fraction),
            router_dtype="float32" if moe.moe_gating_use_fp32 else dtype,
            gating_fp32=bool(moe.moe_gating_use_fp32),
            output_masking=float(moe.moe_eom),
            padding_takes_slots=not moe.use_moe_pad_mask,
        )

    def to_fairseq(self) -> Namespace:
        """The model's arguments as upstream's branch `nllb` would have saved them."""
        args = {
            "arch": "transformer" if self.is_dense else "moe_transformer",
            "activation_fn": ACTIVATIONS[self.activation],
            "no_scale_embedding": not self.scale_embedding,
            "share_all_embeddings": True,
            "max_source_positions": self.max_positions,
            "max_target_positions": self.max_positions,
            **dict(zip((*DROPOUTS, *LAYERDROPS), self.dropouts, strict=True)),
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
                "use_moe_pad_mask": not self.padding_takes_slots,
            }
        return Namespace(**args)


def _served_value(cfg: TransformerConfig, moe: MoEConfig, name: str) -> Any:
    """A field of fairseq's as serving uses it; dotted names are the encoder's or the decoder's; None: unknown."""
    if name in MoEConfig.__dataclass_fields__:
        return getattr(moe, name)
    if name == "activation_fn":
        return str(cfg.activation_fn or "relu")
    if name in ("max_source_positions", "max_target_positions"):
        return DEFAULT_MAX_POSITIONS if getattr(cfg, name) is None else getattr(cfg, name)
    side, _, field = name.rpartition(".")
    return getattr(getattr(cfg, side) if side else cfg, field, None)


def _hf_activation(name: str) -> str:
    return FAIRSEQ_ACTIVATIONS.get(name, name)


def _freq(given: int, numbers: list[int], layers: int, side: str) -> int:
    """Every how many layers there is a MoE layer; the checkpoint's own word, where its tensors do not contradict it.

    CheckpointError where they stand in no such order, as layers do that were kept of a larger model.
    """
    for freq in (given, numbers[0] + 1 if numbers else 0):
        expected = range(freq - 1, layers, freq) if freq > 0 else range(0)
        if (freq > 0 or not numbers) and len(numbers) == len(expected) and numbers == list(expected):
            return freq
    raise CheckpointError(
        f"the {side}'s MoE layers must stand at every n-th of its {layers} layers in a model for Hugging Face's "
        f"layout, found them at {numbers}"
    )
