"""`moe_transformer_lm`: fairseq's transformer language model with MoE layers, and its named architectures."""

from argparse import Namespace
from dataclasses import dataclass

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import (
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_lm_architecture,
    transformer_lm_gpt,
)
from omegaconf import DictConfig, OmegaConf

from fairseq_moe_ext.checkpoints.moe_config import MoEConfig, MoEModelFields, set_defaults
from fairseq_moe_ext.models.served_model import ServedModel
from fairseq_moe_ext.models.transformer_stacks import MoETransformerDecoder


@dataclass
class MoETransformerLanguageModelConfig(MoEModelFields, TransformerLanguageModelConfig):
    """fairseq's fields of a transformer language model and upstream's of its MoE layers."""


@register_model("moe_transformer_lm", dataclass=MoETransformerLanguageModelConfig)
class MoETransformerLanguageModel(ServedModel, TransformerLanguageModel):
    """fairseq's transformer language model; layers that the configuration names have experts."""

    @classmethod
    def build_model(cls, args, task):
        """As fairseq's, with MoE layers; ValueError for an option that such a model cannot have."""
        if getattr(args, "decoder_layers_to_keep", None):  # in the caller's own, which a training saves
            args.decoder_layers = len(args.decoder_layers_to_keep.split(","))
        if isinstance(args, DictConfig):
            # a plain namespace: TransformerConfig drops the fields of a DictConfig that it does not know
            args = Namespace(**OmegaConf.to_container(args, resolve=True))
        for name in ("character_embeddings", "adaptive_input"):
            if getattr(args, name, False):
                raise ValueError(f"{name} is not supported in a MoE language model, got {getattr(args, name)}")
        if getattr(args, "tie_adaptive_weights", False):
            raise ValueError("tie_adaptive_weights must be False without adaptive_input, got True")
        if getattr(args, "offload_activations", False):
            args.checkpoint_activations = True
        if getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = getattr(args, "tokens_per_sample", None) or DEFAULT_MAX_TARGET_POSITIONS
        embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_input_dim)
        moe = MoEConfig.from_args(args)
        cfg = TransformerConfig.from_namespace(args)
        return cls(MoETransformerDecoder(cfg, moe, task.target_dictionary, embed_tokens, no_encoder_attn=True))


@register_model_architecture("moe_transformer_lm", "moe_transformer_lm_tiny")
def moe_transformer_lm_tiny(args):
    """4 layers of model dim 64 with 8 experts in every second one: learns the examples' data on a CPU."""
    set_defaults(
        args,
        decoder_embed_dim=64,
        decoder_ffn_embed_dim=128,
        decoder_layers=4,
        decoder_attention_heads=4,
        share_decoder_input_output_embed=True,
        moe_freq=2,
        moe_expert_count=8,
        moe_gating_use_fp32=True,
        moe_second_expert_policy="all",
    )
    base_lm_architecture(args)


def _published(args, layers: int, model_dim: int, heads: int) -> None:
    """The shape family of upstream's published language models: 512 experts in every second layer."""
    set_defaults(
        args,
        decoder_embed_dim=model_dim,
        decoder_ffn_embed_dim=4 * model_dim,
        decoder_layers=layers,
        decoder_attention_heads=heads,
        share_decoder_input_output_embed=True,
        moe_freq=2,
        moe_expert_count=512,
        moe_gating_use_fp32=True,
        moe_second_expert_policy="all",
        moe_eval_capacity_token_fraction=0.05,
    )
    transformer_lm_gpt(args)


@register_model_architecture("moe_transformer_lm", "moe_transformer_lm_15b")
def moe_transformer_lm_15b(args):
    """Fill in the published 15B model: Table 1's LM-Small."""
    _published(args, layers=12, model_dim=768, heads=12)


@register_model_architecture("moe_transformer_lm", "moe_transformer_lm_52b")
def moe_transformer_lm_52b(args):
    """Fill in the published 52B model: Table 1's LM."""
    _published(args, layers=24, model_dim=1024, heads=16)
