"""fairseq's encoder and decoder with MoE layers where the configuration puts them, each pass made known."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase

from fairseq_moe_ext.checkpoints.kept_layers import kept_numbers
from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.models.fairseq_version import check_fairseq
from fairseq_moe_ext.models.transformer_layer import (
    MoETransformerDecoderLayer,
    MoETransformerEncoderLayer,
    alternate_config,
    mend_activations,
)


class _ObservedStack:
    """Mixin before one of fairseq's stacks: its `observer`, where it has one, is told of every layer's output."""

    observer = None

    def _watch_layers(self, side: str) -> None:
        for number, layer in self.layers.named_children():
            layer.register_forward_hook(partial(self._tell, f"{side}.layers.{number}"))

    def _tell(self, name: str, _layer, _inputs, output) -> None:
        if self.observer is not None:
            self.observer.layer_output(name, output[0] if isinstance(output, tuple) else output)


class MoETransformerEncoder(_ObservedStack, TransformerEncoderBase):
    """An encoder whose `observer`, where it has one, is told of every pass."""

    def __init__(self, cfg, moe: MoEConfig, dictionary, embed_tokens, return_fc: bool = False):
        check_fairseq()
        self._moe, self._built = moe, 0
        super().__init__(cfg, dictionary, embed_tokens, return_fc=return_fc)
        mend_activations(self)
        self._watch_layers("encoder")

    def build_encoder_layer(self, cfg):
        """The next layer: MoE, alternate or fairseq's own."""
        number, self._built = self._built, self._built + 1
        if not self._moe.is_moe_layer("encoder", _number_before(cfg.encoder.layers_to_keep, number)):
            return super().build_encoder_layer(cfg)
        hidden_dim = self._moe.alternate_hidden_dim("encoder")
        if hidden_dim > 0:
            return super().build_encoder_layer(alternate_config(cfg, "encoder", hidden_dim))
        return MoETransformerEncoderLayer(cfg, self._moe.of_layer("encoder", number), return_fc=self.return_fc)

    def forward(self, src_tokens, *args, **kwargs):
        """As fairseq's; src_tokens (B, L)."""
        with self._observed(src_tokens):
            return super().forward(src_tokens, *args, **kwargs)

    def _observed(self, src_tokens):
        if self.observer is None:
            return nullcontext()
        return self.observer.encoder_pass(src_tokens, src_tokens.ne(self.padding_idx))


class MoETransformerDecoder(_ObservedStack, TransformerDecoderBase):
    """A decoder whose `observer`, where it has one, is told of every pass; also a language model's stack."""

    def __init__(self, cfg, moe: MoEConfig, dictionary, embed_tokens, no_encoder_attn: bool = False):
        self._moe, self._built = moe, 0
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)
        mend_activations(self)
        self._watch_layers("decoder")

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        """The next layer: MoE, alternate or fairseq's own."""
        number, self._built = self._built, self._built + 1
        if not self._moe.is_moe_layer("decoder", _number_before(cfg.decoder.layers_to_keep, number)):
            return super().build_decoder_layer(cfg, no_encoder_attn)
        hidden_dim = self._moe.alternate_hidden_dim("decoder")
        if hidden_dim > 0:
            return super().build_decoder_layer(alternate_config(cfg, "decoder", hidden_dim), no_encoder_attn)
        return MoETransformerDecoderLayer(cfg, self._moe.of_layer("decoder", number), no_encoder_attn)

    def forward(self, prev_output_tokens, encoder_out=None, incremental_state=None, **kwargs):
        """As fairseq's; prev_output_tokens (B, L)."""
        with self._observed(prev_output_tokens, incremental_state is not None):
            return super().forward(prev_output_tokens, encoder_out, incremental_state, **kwargs)

    def _observed(self, prev_output_tokens, incremental: bool):
        if self.observer is None:
            return nullcontext()
        entering = prev_output_tokens[:, -1:] if incremental else prev_output_tokens
        return self.observer.decoder_pass(prev_output_tokens, entering.ne(self.padding_idx), incremental)


def _number_before(given: str | None, number: int) -> int:
    """What number a layer had in the model of which the layers of `--*-layers-to-keep` are kept.

    >>> _number_before("5,1", 0), _number_before(None, 0)
    (1, 0)
    """
    return kept_numbers(given)[number] if given else number
