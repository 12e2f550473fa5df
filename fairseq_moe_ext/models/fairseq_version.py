"""Whether the fairseq that is installed is one whose layers can hold experts."""

from __future__ import annotations

import fairseq
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase


def check_fairseq() -> None:
    """ValueError where encoder layers have release 0.12.2's fast path.

    That computes a layer from copies of a dense feed-forward's weights, which it makes while a checkpoint is loaded
    (`load_to_BT`), past whatever stands in the feed-forward's place.
    """
    if "_load_from_state_dict" in vars(TransformerEncoderLayerBase):
        raise ValueError(
            "fairseq must be without the encoder's fast path of release 0.12.2, which computes MoE layers past their "
            f"experts, got {fairseq.__version__}: take fairseq-fixed 0.12.3.1 or fairseq's branch main"
        )
