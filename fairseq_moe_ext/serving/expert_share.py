"""Each rank's share of a model's experts, before the weights come, and the capacity that depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from fairseq_moe_ext.balancing.placement import Placement, contiguous
from fairseq_moe_ext.experts.formats import FLOAT
from fairseq_moe_ext.experts.quantized import QuantizedExperts
from fairseq_moe_ext.gating.capacity import Capacity, CapacityRules
from fairseq_moe_ext.gating.limit import Limit
from fairseq_moe_ext.gating.replicas import Replicas
from fairseq_moe_ext.gating.second_choice import SecondChoice
from fairseq_moe_ext.models.served_model import ServedModel
from fairseq_moe_ext.ranks.dispatcher import over_ranks
from fairseq_moe_ext.ranks.group import Ranks
from fairseq_moe_ext.serving.expert_buffer import BufferSettings, ExpertBuffer


@dataclass(frozen=True)
class CapacitySettings:
    """Capacity-aware inference as the user wants it served.

    phases: one of CAPACITY_PHASES. virtual_ranks: as how many ranks one process counts its capacity.
    prefer_resident: overflow goes to the experts first that are in a buffer.
    """

    rules: CapacityRules
    phases: str = "all"
    virtual_ranks: int = 1
    prefer_resident: bool = False


def distribute_experts(
    model: ServedModel,
    ranks: Ranks | None,
    buffer: BufferSettings | None,
    capacity: CapacitySettings | None,
    placement: Placement | None,
    kernel: str,
    weights: str = FLOAT,
) -> None:
    """Give the model's layers their experts: this rank's share, in a buffer, under a capacity, as the settings say.

    weights: one of FORMATS (experts/formats.py); where it is not `float`, the model's experts have no memory yet.

    Sets `model.expert_buffer`. ValueError where model, ranks and settings do not fit together.
    """
    num_ranks, local_ranks = (1, 1) if ranks is None else (ranks.world_size, ranks.local_ranks)
    virtual = capacity is not None and ranks is None
    if virtual:
        num_ranks = capacity.virtual_ranks
    ranks_of = place_experts(model, placement, num_ranks, virtual)
    model.expert_buffer = None if buffer is None else ExpertBuffer(buffer, local_ranks, model.kept_experts)
    share_experts(model, ranks, ranks_of, model.expert_buffer, weights)
    if capacity is not None:
        limit_experts(model, capacity, ranks_of, num_ranks, None if ranks is None else ranks.rank)
    choose_kernels(model, kernel)


def place_experts(
    model: ServedModel, placement: Placement | None, num_ranks: int, virtual: bool = False
) -> dict[str, Sequence[Sequence[int]]]:
    """Per layer the ranks of every expert: by a placement, else in rising number.

    virtual: one process counts as so many ranks. ValueError where the placement is of another model or number of ranks,
    or where ranks outnumber the experts.
    """
    num_experts = {name: layer.experts.num_experts for name, layer in model.moe_layers().items()}
    if placement is None:
        if virtual and num_ranks > min(num_experts.values()):
            raise ValueError(
                "--moe-virtual-ranks must be at most the experts of a layer, "
                f"{min(num_experts.values())}, got {num_ranks}"
            )
        return {name: contiguous(count, num_ranks) for name, count in num_experts.items()}
    kept = model.kept_experts
    try:
        placement.check_fits(num_ranks, num_experts if kept is None else dict.fromkeys(num_experts, kept.num_experts))
    except ValueError as error:
        raise ValueError(f"--expert-placement: {error}") from error
    if kept is None:
        return dict(placement.layers)
    return {name: [ranks[expert] for expert in kept.layers[name]] for name, ranks in placement.layers.items()}


def share_experts(
    model: ServedModel,
    ranks: Ranks | None,
    ranks_of: Mapping[str, Sequence[Sequence[int]]],
    buffer: ExpertBuffer | None = None,
    weights: str = FLOAT,
) -> None:
    """Leave this rank the experts that lie on it, in `buffer` if there is one, and connect the layers with other ranks.

    ranks_of: per layer the ranks of every expert. weights: as of `distribute_experts`.
    """
    layers = model.moe_layers()
    replicas = {}
    for name, layer in layers.items() if ranks is not None else ():
        replicas[name] = Replicas(ranks_of[name], ranks.rank, ranks.world_size)
        with nullcontext() if buffer is None and weights == FLOAT else torch.device("meta"):  # no memory is needed yet
            layer.use(experts=layer.experts.share(replicas[name].local[ranks.rank]))
    for layer in layers.values() if weights != FLOAT else ():
        with nullcontext() if buffer is None else torch.device("meta"):
            layer.use(experts=QuantizedExperts.in_place_of(layer.experts, weights))
    if buffer is not None:
        buffer.install(layers)
    for name, each in replicas.items():
        layer = layers[name]
        layer.use(dispatcher=over_ranks(layer.dispatcher, ranks.exchange.register(layer.experts, each)))


def limit_experts(
    model: ServedModel,
    settings: CapacitySettings,
    ranks_of: Mapping[str, Sequence[Sequence[int]]],
    num_ranks: int,
    rank: int | None,
) -> None:
    """Give every MoE layer its capacity; of an expert's replicas the first says which rank is its own.

    rank: this process's; None: alone it counts as all of them.
    """
    for name, layer in model.moe_layers().items():
        capacity = Capacity(settings.rules, [ranks[0] for ranks in ranks_of[name]], num_ranks)
        layer.use(rules=[*layer.rules, Limit(capacity, settings.phases, settings.prefer_resident, rank)])


def drop_second_choices(model: ServedModel, threshold: float) -> None:
    """Let tokens of every MoE layer go without a second choice of a share below `threshold`, before any capacity.

    ValueError for a model whose tokens have one choice.
    """
    for layer in model.moe_layers().values():
        if layer.gate.num_choices != 2:
            raise ValueError(
                f"--moe-second-choice-threshold needs a model with two choices per token, got {threshold} with one of "
                f"{layer.gate.num_choices}"
            )
        layer.use(rules=[SecondChoice(threshold), *layer.rules])


def choose_kernels(model: ServedModel, kernel: str) -> None:
    """`--moe-kernel` for the experts as they are shared out."""
    for layer in model.moe_layers().values():
        layer.experts.use_kernel(kernel)
