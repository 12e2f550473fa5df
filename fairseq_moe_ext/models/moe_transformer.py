"""`moe_transformer`: fairseq's encoder-decoder transformer with MoE layers, and its named architectures."""

from __future__ import annotations

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig, TransformerModel
from fairseq.models.transformer.transformer_legacy import base_architecture

from fairseq_moe_ext.checkpoints.moe_config import MoEConfig, MoEModelFields, set_defaults
from fairseq_moe_ext.models.served_model import ServedModel
from fairseq_moe_ext.models.transformer_stacks import MoETransformerDecoder, MoETransformerEncoder


@register_model("moe_transformer")
class MoETransformerModel(ServedModel, TransformerModel):
    """fairseq's transformer; layers that the configuration names have experts in place of their feed-forward."""

    @classmethod
    def add_args(cls, parser):
        """fairseq's options and the MoE fields, without defaults."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, MoEModelFields(), delete_default=True)

    @classmethod
    def build_model(cls, args, task):
        """As fairseq's; layers to keep may be a list, as its own parser makes them."""
        for name in ("encoder_layers_to_keep", "decoder_layers_to_keep"):
            kept = getattr(args, name, None)
            if isinstance(kept, list):  # as fairseq's parser gives it, where the rest of fairseq reads a text
                setattr(args, name, ",".join(map(str, kept)))
        return super().build_model(args, task)

    @classmethod
    def build_encoder(cls, args, src_dict, embed_tokens):
        """As fairseq's, with MoE layers where the fields put them."""
        moe = MoEConfig.from_args(args)
        return MoETransformerEncoder(TransformerConfig.from_namespace(args), moe, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args, tgt_dict, embed_tokens):
        """As fairseq's, with MoE layers where the fields put them."""
        moe = MoEConfig.from_args(args)
        cfg = TransformerConfig.from_namespace(args)
        return MoETransformerDecoder(cfg, moe, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


@register_model_architecture("moe_transformer", "moe_transformer")
def moe_transformer(args):
    """Fill in fairseq's base architecture."""
    base_architecture(args)


@register_model_architecture("moe_transformer", "moe_transformer_tiny")
def moe_transformer_tiny(args):
    """2 + 2 layers of model dim 96 with 8 experts in every second one: learns the examples' data on a CPU."""
    for side in ("encoder", "decoder"):
        set_defaults(
            args,
            **{
                f"{side}_embed_dim": 96,
                f"{side}_ffn_embed_dim": 192,
                f"{side}_layers": 2,
                f"{side}_attention_heads": 4,
                f"{side}_normalize_before": True,
            },
        )
    set_defaults(
        args,
        share_all_embeddings=True,
        moe_freq=2,
        moe_expert_count=8,
        moe_gating_use_fp32=True,
        moe_second_expert_policy="all",
        use_moe_pad_mask=True,
    )
    base_architecture(args)


@register_model_architecture("moe_transformer", "moe_transformer_nllb_54b")
def moe_transformer_nllb_54b(args):
    """NLLB-200 54.5B: 24 + 24 layers, model dim 2048, 128 experts in every fourth layer."""
    for side in ("encoder", "decoder"):
        set_defaults(
            args,
            **{
                f"{side}_embed_dim": 2048,
                f"{side}_ffn_embed_dim": 8192,
                f"{side}_layers": 24,
                f"{side}_attention_heads": 16,
                f"{side}_normalize_before": True,
            },
        )
    set_defaults(
        args,
        share_all_embeddings=True,
        max_source_positions=512,
        max_target_positions=512,
        moe_freq=4,
        moe_expert_count=128,
        moe_gating_use_fp32=True,
        moe_second_expert_policy="all",
        moe_normalize_gate_prob_before_dropping=False,
        moe_eval_capacity_token_fraction=1.0,
        use_moe_pad_mask=True,
        moe_eom=0.2,
    )
    base_architecture(args)
