"""Conditional MoE routing: a layer that mixes a shared dense feed-forward with the experts, token by token.

Source: upstream's `modules/moe/moe_cmr_layer.py` (branch `nllb`). Legend: B = sentences, L = positions, D = model dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CMRGate(nn.Module):
    """The share of the experts in every token's output, 0 on padding; `drop` zeroes some in training or if retained."""

    retain_dropout = False  # in evaluation, too

    def __init__(self, model_dim: int, drop: float = 0.0):
        super().__init__()
        self.wg = nn.Linear(model_dim, 1)
        self.drop = drop

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), padding_mask (B, L) bool with True on padding -> (B, L)."""
        share = F.dropout(self.wg(x).squeeze(-1).sigmoid(), self.drop, self.training or self.retain_dropout)
        return share if padding_mask is None else share.masked_fill(padding_mask, 0)


class CMRLayer(nn.Module):
    """`dense(x) * (1 - g) + moe_layer(x) * g`, with g the CMR gate's.

    moe_layer stands under this module's name in the state dict as well, as upstream has it; upstream's buffer
    `lang_idx` serves logging alone and is skipped on loading.
    """

    def __init__(self, moe_layer: nn.Module, dense: Callable[[Tensor], Tensor], model_dim: int, drop: float = 0.0):
        super().__init__()
        self.moe_layer = moe_layer
        self.dense = dense
        self.gate = CMRGate(model_dim, drop)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, decoding: bool = False) -> Tensor:
        """x (B, L, D), padding_mask (B, L) bool with True on padding -> (B, L, D); decoding: a decode step."""
        share = self.gate(x, padding_mask).unsqueeze(-1)
        return torch.lerp(self.dense(x), self.moe_layer(x, padding_mask, decoding), share)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + "lang_idx", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
