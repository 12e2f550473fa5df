"""Each rank's share of a model's experts, before the weights come: by a placement, else in rising number."""

from __future__ import annotations

from fairseq_moe_ext.balancing.placement import Placement, contiguous
from fairseq_moe_ext.gating.copies import ExpertCopies
from fairseq_moe_ext.models.served_model import ServedModel
from fairseq_moe_ext.serving.ranks import Ranks


def share_experts(model: ServedModel, ranks: Ranks | None, placement: Placement | None) -> None:
    """Leave this rank the experts that lie on it, and connect every MoE layer with the other ranks.

    ValueError where the placement is of another model or number of ranks, or where ranks outnumber the experts.
    """
    layers = model.moe_layers()
    num_experts = {name: layer.experts.num_experts for name, layer in layers.items()}
    if placement is not None:
        try:
            placement.check_fits(1 if ranks is None else ranks.world_size, num_experts)
        except ValueError as error:
            raise ValueError(f"--expert-placement: {error}") from error
    if ranks is None:
        return
    for name, layer in layers.items():
        if placement is None:
            ranks_of_experts = contiguous(num_experts[name], ranks.world_size)
        else:
            ranks_of_experts = placement.layers[name]
        copies = ExpertCopies(ranks_of_experts, ranks.rank, ranks.world_size)
        layer.experts = layer.experts.share(copies.held[ranks.rank])
        layer.exchange = ranks.exchange.register(layer.experts, copies)
