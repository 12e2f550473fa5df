"""A token's way through one Mixture-of-Experts layer (pure PyTorch, knows nothing of fairseq)."""

from fairseq_moe_ext.gating.layer import MOELayer
from fairseq_moe_ext.gating.routing import Routing, Top1Gate, Top2Gate

__all__ = ["MOELayer", "Routing", "Top1Gate", "Top2Gate"]
