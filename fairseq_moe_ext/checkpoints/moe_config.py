"""The Mixture-of-Experts fields of a model, by upstream's names and defaults, and what of them a layer needs.

Source: upstream's `models/transformer_lm.py` (branch `moe`) and `transformer_config.py` (branch `nllb`).
"""

import copy
import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, Optional, get_args

from fairseq.dataclass import FairseqDataclass
from omegaconf import II
from omegaconf.errors import InterpolationResolutionError

from fairseq_moe_ext.gating.slots import StaticOptions


@dataclass
class MoEModelFields(FairseqDataclass):
    """Fields that upstream adds to its transformers; a checkpoint's configuration holds them."""

    moe_freq: int = field(default=0, metadata={"help": "every moe-freq-th layer is a MoE layer; 0: none"})
    encoder_moe_freq: int = field(default=0, metadata={"help": "as --moe-freq, for the encoder; the larger counts"})
    decoder_moe_freq: int = field(default=0, metadata={"help": "as --moe-freq, for the decoder; the larger counts"})
    moe_expert_count: int = field(default=0, metadata={"help": "experts in each MoE layer"})
    moe_gating_use_fp32: bool = field(default=False, metadata={"help": "softmax and gating in float32"})
    moe_second_expert_policy: str = field(
        default="sampling", metadata={"help": "how the second expert is chosen: all, sampling or random"}
    )
    moe_normalize_gate_prob_before_dropping: bool = field(
        default=False, metadata={"help": "normalise the two weights before the capacity drops assignments"}
    )
    moe_top1_expert: bool = field(default=False, metadata={"help": "one expert per token instead of two"})
    moe_eval_capacity_token_fraction: float = field(
        default=0.25, metadata={"help": "static gating: slots per expert in evaluation, as a share of the tokens"}
    )
    moe_eval_capacity_max_seqlen: bool = field(
        default=False, metadata={"help": "static gating: the share is of rows times max positions, not of the tokens"}
    )
    moe_normalize_expert_grad: Optional[str] = field(
        default="world_size", metadata={"help": "read for upstream's sake; on one rank it changes nothing"}
    )
    use_moe_pad_mask: bool = field(default=False, metadata={"help": "static gating: padding takes no slots"})
    moe_batch_prioritized_routing: bool = field(
        default=False, metadata={"help": "static gating: the most certain tokens queue first"}
    )
    moe_eom: float = field(default=0.0, metadata={"help": "expert output masking"})
    moe_fom: float = field(default=0.0, metadata={"help": "masking of the layer's output before the residual"})
    moe_cmr: bool = field(default=False, metadata={"help": "conditional MoE routing: mix with a dense feed-forward"})
    cmr_gate_drop: float = field(default=0.0, metadata={"help": "dropout of the CMR gate"})
    alternate_ffn_embed_dim: int = field(
        default=0, metadata={"help": "hidden dim of dense layers in place of the (encoder's) MoE layers; 0: MoE"}
    )
    alternate_decoder_ffn_embed_dim: int = field(default=0, metadata={"help": "the same in the decoder"})
    moe_gating: str = II("task.moe_gating")
    batch_size: Optional[int] = II("dataset.batch_size")
    batch_size_valid: Optional[int] = II("dataset.batch_size_valid")


class MoEConfig(MoEModelFields):
    """The fields of one model as its layers read them: nothing unset, each side's own freq."""

    initialize_experts = True  # False where a checkpoint's weights follow at once
    allocate_experts = True  # False where others take their place, so that they need no memory
    layers_of_experts: dict[str, list[int]] | None = None  # side -> numbers, of a checkpoint; None: as the freqs say
    experts_of_layers: dict[str, int] | None = None  # of a pruned model, by its MoE layers' names; None: all alike

    @classmethod
    def from_args(cls, args: Any) -> "MoEConfig":
        """Read the fields off a model's arguments (any object with attributes); what is missing has its default."""
        values = {item.name: _value(args, item.name, item.default) for item in fields(MoEModelFields)}
        if values["moe_gating"] == II("task.moe_gating"):
            values["moe_gating"] = "dynamic"
        values |= {item.name: _typed(item, values[item.name]) for item in fields(MoEModelFields)}
        for side in ("encoder_moe_freq", "decoder_moe_freq"):
            values[side] = max(int(values[side] or 0), int(values["moe_freq"] or 0))
        fraction = values["moe_eval_capacity_token_fraction"]
        if not isinstance(fraction, int | float) or not math.isfinite(fraction):
            raise ValueError(f"moe_eval_capacity_token_fraction must be a finite number, got {fraction!r}")
        config = cls(**values)
        for name in ("initialize_experts", "allocate_experts"):
            setattr(config, name, getattr(args, name, True))
        config.layers_of_experts = getattr(args, "layers_of_experts", None)
        config.experts_of_layers = getattr(args, "experts_of_layers", None)
        return config

    def of_layer(self, side: str, number: int) -> "MoEConfig":
        """The fields as layer `number` of `side` reads them, which may have fewer experts than others."""
        if self.experts_of_layers is None:
            return self
        found = copy.copy(self)
        found.moe_expert_count = self.experts_of_layers[f"{side}.layers.{number}.moe_layer"]
        return found

    def is_moe_layer(self, side: str, number: int) -> bool:
        """Whether layer `number` (from 0) of `side` (`encoder` or `decoder`) stands where MoE layers stand."""
        if self.layers_of_experts is not None:
            return number in self.layers_of_experts[side]
        freq = getattr(self, f"{side}_moe_freq")
        return freq > 0 and (number + 1) % freq == 0

    def alternate_hidden_dim(self, side: str) -> int:
        """The hidden dim of dense layers that stand in the MoE layers' place; 0 where those are MoE layers."""
        return self.alternate_ffn_embed_dim if side == "encoder" else self.alternate_decoder_ffn_embed_dim

    def static_options(self, max_positions: int) -> StaticOptions:
        """What static gating needs; max_positions: the model's."""
        return StaticOptions(
            capacity_fraction=float(self.moe_eval_capacity_token_fraction),
            batch_prioritized=self.moe_batch_prioritized_routing,
            count_padding=not self.use_moe_pad_mask,
            batch_size=self.batch_size,
            batch_size_valid=self.batch_size_valid,
            max_positions=max_positions if self.moe_eval_capacity_max_seqlen else None,
        )


def _typed(item: Field, value: Any) -> Any:
    """`value` in the type of its field; a command line and `--model-overrides` may give it as text.

    ValueError names field, type and value.
    """
    if isinstance(value, str) and value.startswith("${"):  # what it points at is not there
        return None
    kind = get_args(item.type)[0] if get_args(item.type) else item.type
    if value is None or kind is str or type(value) is kind:
        return value
    try:
        if kind is bool:
            return {"True": True, "False": False, "1": True, "0": False}[str(value)]
        number = float(value)
        if kind is float:
            return number
        if number == int(number):
            return int(number)
    except (KeyError, ValueError, TypeError, OverflowError):
        pass
    names = {int: "a whole number", float: "a finite number", bool: "True or False"}
    raise ValueError(f"{item.name} must be {names[kind]}, got {value!r}")


def _value(args: Any, name: str, default: Any) -> Any:
    try:
        value = getattr(args, name, None)
    except InterpolationResolutionError:  # a field that points at a task's flag, under a task without it
        value = None
    return default if value is None else value


def has_moe_layers(args: Any) -> bool:
    """Whether a model's arguments ask for MoE layers, or for the dense layers that stand in their place."""
    config = MoEConfig.from_args(args)
    if config.layers_of_experts is not None:
        return any(config.layers_of_experts.values())
    return max(config.encoder_moe_freq, config.decoder_moe_freq) > 0


def set_defaults(args: Any, **values: Any) -> None:
    """What a named architecture sets where the command line says nothing."""
    for name, value in values.items():
        setattr(args, name, getattr(args, name, value))
