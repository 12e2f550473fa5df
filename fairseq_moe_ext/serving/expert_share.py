"""Each rank's share of a model's experts, before the weights come: by a placement, else in rising number."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from fairseq_moe_ext.balancing.placement import Placement, contiguous
from fairseq_moe_ext.gating.copies import ExpertCopies
from fairseq_moe_ext.models.served_model import ServedModel
from fairseq_moe_ext.serving.expert_buffer import ExpertBuffer
from fairseq_moe_ext.serving.ranks import Ranks


def share_experts(
    model: ServedModel, ranks: Ranks | None, placement: Placement | None, buffer: ExpertBuffer | None
) -> None:
    """Leave this rank the experts that lie on it, in `buffer` if there is one, and connect the layers with other ranks.

    ValueError where the placement is of another model or number of ranks, or where ranks outnumber the experts.
    """
    layers = model.moe_layers()
    num_experts = {name: layer.experts.num_experts for name, layer in layers.items()}
    if placement is not None:
        try:
            placement.check_fits(1 if ranks is None else ranks.world_size, num_experts)
        except ValueError as error:
            raise ValueError(f"--expert-placement: {error}") from error
    copies = {}
    for name, layer in layers.items() if ranks is not None else ():
        if placement is None:
            ranks_of_experts = contiguous(num_experts[name], ranks.world_size)
        else:
            ranks_of_experts = placement.layers[name]
        copies[name] = ExpertCopies(ranks_of_experts, ranks.rank, ranks.world_size)
        with nullcontext() if buffer is None else torch.device("meta"):  # a buffer's experts need no memory yet
            layer.experts = layer.experts.share(copies[name].held[ranks.rank])
    if buffer is not None:
        buffer.install(layers)
    for name, each in copies.items():
        layers[name].exchange = ranks.exchange.register(layers[name].experts, each)
