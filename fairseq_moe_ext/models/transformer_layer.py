"""fairseq's transformer layers with a MoE layer in the place of their feed-forward: a seam, no copied forward pass.

fairseq's layers compute `fc2(dropout(activation(fc1(x))))`. Here `fc1` is a method that runs the whole feed-forward,
`fc2` one that hands its input through, and what stands between them is identity, so that attention, norms and
residuals stay fairseq's own. Legend: L = positions, B = sentences, D = model dim.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.modules import transformer_layer
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.fairseq_dropout import FairseqDropout
from torch import Tensor, nn

from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.checkpoints.supported_fields import check_layer_options
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.cmr import CMRLayer
from fairseq_moe_ext.gating.routing import gate_of_model
from fairseq_moe_ext.gating.slots import dispatcher_for

UPSTREAMS_EXPERT = "FeedForwardNetwork"  # the class that upstream's experts are of


def build_moe_layer(moe: MoEConfig, cfg, model_dim: int, hidden_dim: int, max_positions: int) -> MOELayer:
    """The MoE layer that a checkpoint's fields describe; `cfg` is fairseq's TransformerConfig."""
    if moe.moe_expert_count < 1:
        raise ValueError(f"moe_expert_count must be at least 1 where there are MoE layers, got {moe.moe_expert_count}")
    check_layer_options(cfg, trains=moe.initialize_experts)
    gate = gate_of_model(moe, model_dim)
    activation = activation_named(str(cfg.activation_fn or "relu"))
    dropout = float(cfg.activation_dropout or cfg.relu_dropout or 0)
    with nullcontext() if moe.allocate_experts else torch.device("meta"):
        experts = ResidentExperts(
            moe.moe_expert_count, model_dim, hidden_dim, activation, dropout, initialize=moe.initialize_experts
        )
    return MOELayer(gate, experts, dispatcher_for(moe.moe_gating, moe.static_options(max_positions)), moe.moe_eom)


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """fairseq's activation of that name, Tensor -> Tensor."""
    if name == "gelu":
        return F.gelu  # fairseq's own computes in float32, as PyTorch's does, which the kernels know
    if name == "swish":
        return F.silu  # fairseq hands out a module's class, which is no function of tensors
    return utils.get_activation_fn(name)


def mend_activations(stack: nn.Module) -> None:
    """Give fairseq's dense layers in `stack` the function where fairseq gave them that class."""
    for layer in stack.modules():
        if getattr(layer, "activation_fn", None) is nn.SiLU:
            layer.activation_fn = F.silu


def alternate_config(cfg, side: str, hidden_dim: int):
    """A copy of TransformerConfig `cfg` with another hidden dim on one `side` (`encoder` or `decoder`)."""
    cfg = copy.copy(cfg)
    half = copy.copy(getattr(cfg, side))
    half.ffn_embed_dim = hidden_dim
    setattr(cfg, side, half)
    return cfg


class _MoEFeedForward:
    """Mixin before one of fairseq's layer classes; `_pass` is one forward pass of such a layer."""

    _padding_mask: Tensor | None = None
    _decoding = False  # whether the pass is a decode step
    _checkpointed = None  # under --checkpoint-activations: a pass that is computed again in the backward pass

    def build_fc1(self, input_dim, output_dim, q_noise, qn_block_size):
        return super().build_fc1(input_dim, output_dim, q_noise, qn_block_size) if self._moe.moe_cmr else nn.Identity()

    build_fc2 = build_fc1

    def _install(self, model_dim: int, hidden_dim: int, max_positions: int) -> None:
        """Put the MoE layer in; called when fairseq's own constructor is done."""
        self.moe_layer = build_moe_layer(self._moe, self._cfg, model_dim, hidden_dim, max_positions)
        self.moe_fom = self._moe.moe_fom
        self._dense_activation = activation_named(str(self._cfg.activation_fn or "relu"))
        self._dense_dropout = self.activation_dropout_module
        # says whether the experts' own stays on in serving (retained_dropout.py)
        self.experts_dropout = FairseqDropout(self._dense_dropout.p, UPSTREAMS_EXPERT)
        self.activation_fn, self.activation_dropout_module = _identity, nn.Identity()
        if self._moe.moe_cmr:
            self.cmr_layer = CMRLayer(self.moe_layer, self._dense_feed_forward, model_dim, self._moe.cmr_gate_drop)
        else:
            for name in ("fc1", "fc2", "ffn_layernorm"):
                self._modules.pop(name, None)
        if self._cfg.checkpoint_activations:
            holder = checkpoint_wrapper(Namespace(forward=self._pass_with_gate_loss), self._cfg.offload_activations)
            self._checkpointed = holder.forward

    def _run(self, *args, **kwargs):
        """One pass; a checkpointed one keeps no graph, so that its gate loss leaves beside the result."""
        if self._checkpointed is None or self.moe_layer.serving or not torch.is_grad_enabled():
            return self._pass(*args, **kwargs)
        *results, gate_loss = self._checkpointed(*args, **kwargs)
        self.moe_layer.recall(self.moe_layer.statistics, gate_loss)
        return tuple(results) if len(results) > 1 else results[0]

    def _pass_with_gate_loss(self, *args, **kwargs) -> tuple:
        of_first_pass = self.moe_layer.statistics
        results = self._pass(*args, **kwargs)
        gate_loss = self.moe_layer.gate_loss()
        if torch.is_grad_enabled():  # the second pass, whose graph nobody is to keep
            self.moe_layer.recall(of_first_pass)
        return (*(results if isinstance(results, tuple) else (results,)), gate_loss)

    def _dense_feed_forward(self, x: Tensor) -> Tensor:
        """CMR's shared branch, by the modules that the methods below hide."""
        x = self._dense_dropout(self._dense_activation(self._modules["fc1"](x)))
        norm = self._modules.get("ffn_layernorm")
        return self._modules["fc2"](x if norm is None else norm(x))

    def fc1(self, x: Tensor) -> Tensor:
        """x (L, B, D) -> the feed-forward's output (L, B, D)."""
        mask = self._padding_mask
        if mask is not None and mask.size(1) != x.size(0):
            mask = mask[:, -x.size(0) :]  # incremental decoding: the mask may cover tokens that are not in the input
        if self.moe_layer.dispatcher.counts_padding:
            mask = None  # as upstream has it, also for the gate of CMR
        module = self.cmr_layer if self._moe.moe_cmr else self.moe_layer
        x = module(x.transpose(0, 1), mask, self._decoding)
        if self.moe_fom > 0:
            if self.training:
                x = x * (torch.rand(x.shape[:2], device=x.device) > self.moe_fom).unsqueeze(-1)
            else:
                x = x * (1 - self.moe_fom)
        return x.transpose(0, 1)

    def fc2(self, x: Tensor) -> Tensor:
        return x

    def ffn_layernorm(self, x: Tensor) -> Tensor:
        return x


def _identity(x: Tensor) -> Tensor:
    return x


class MoETransformerEncoderLayer(_MoEFeedForward, transformer_layer.TransformerEncoderLayerBase):
    """fairseq's encoder layer with a MoE layer as its feed-forward."""

    def __init__(self, cfg, moe: MoEConfig, return_fc: bool = False):
        self._moe, self._cfg = moe, cfg
        super().__init__(cfg, return_fc=return_fc)
        self._install(cfg.encoder.embed_dim, cfg.encoder.ffn_embed_dim, cfg.max_source_positions)

    def forward(self, x, encoder_padding_mask, attn_mask=None):
        """x (L, B, D), encoder_padding_mask (B, L) or None -> (L, B, D), as fairseq's."""
        return self._run(x, encoder_padding_mask, attn_mask)

    def _pass(self, x, encoder_padding_mask, attn_mask=None):
        self._padding_mask = encoder_padding_mask
        return super().forward(x, encoder_padding_mask, attn_mask)


class MoETransformerDecoderLayer(_MoEFeedForward, transformer_layer.TransformerDecoderLayerBase):
    """fairseq's decoder layer with a MoE layer as its feed-forward."""

    def __init__(self, cfg, moe: MoEConfig, no_encoder_attn: bool = False):
        self._moe, self._cfg = moe, cfg
        super().__init__(cfg, no_encoder_attn)
        self._install(cfg.decoder.embed_dim, cfg.decoder.ffn_embed_dim, cfg.max_target_positions)

    def forward(self, *args, **kwargs):
        """As fairseq's: x (L, B, D) -> (x, attention or None, None)."""
        return self._run(*args, **kwargs)

    def _pass(
        self,
        x,
        encoder_out=None,
        encoder_padding_mask=None,
        incremental_state=None,
        *args,
        self_attn_padding_mask=None,
        **kwargs,
    ):
        self._padding_mask = self_attn_padding_mask
        self._decoding = incremental_state is not None
        known = {"self_attn_padding_mask": self_attn_padding_mask, **kwargs}
        return super().forward(x, encoder_out, encoder_padding_mask, incremental_state, *args, **known)
