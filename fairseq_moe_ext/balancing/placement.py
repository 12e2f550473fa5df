"""Which ranks hold which expert, per MoE layer, and the file that says so (`--expert-placement`).

Legend: E = experts of a layer, R = ranks (the world size).
The file is JSON: {"world_size": R, "method": "...", "layers": {"encoder.layers.3.moe_layer": [[0], [1, 3], ...]}}; per
layer a list of ranks per expert.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.bounded_json import read_json

# per expert of one layer, the ranks that hold a copy of it
LayerPlacement = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Placement:
    """Per MoE layer, by its name in the checkpoint, the ranks of every expert; `method` says how it was found."""

    world_size: int
    layers: Mapping[str, LayerPlacement]
    method: str = "unknown"

    def __post_init__(self):
        for name, ranks_of_experts in self.layers.items():
            for expert, ranks in enumerate(ranks_of_experts):
                what = f"placement of {name[:80]}: expert {expert}"
                if not ranks:
                    raise ValueError(f"{what} must lie on at least one rank, got none")
                if len(set(ranks)) < len(ranks):
                    raise ValueError(f"{what} must lie on a rank once at most, got ranks {_shown(list(ranks))}")
                if min(ranks) < 0 or max(ranks) >= self.world_size:
                    raise ValueError(f"{what} must lie on ranks 0 to {self.world_size - 1}, got {_shown(list(ranks))}")

    def check_fits(self, world_size: int, num_experts: Mapping[str, int]) -> None:
        """ValueError unless this is a placement for `world_size` ranks and a model of these layers, name -> E."""
        if self.world_size != world_size:
            raise ValueError(f"the placement must be for {world_size} ranks, got one for {self.world_size}")
        if set(self.layers) != set(num_experts):
            missing, unknown = sorted(set(num_experts) - set(self.layers)), sorted(set(self.layers) - set(num_experts))
            fault = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model lacks"
            raise ValueError(f"the placement must name the model's {len(num_experts)} MoE layers; it {fault}")
        for name, count in num_experts.items():
            if len(self.layers[name]) != count:
                raise ValueError(
                    f"the placement must place the {count} experts of {name}, got {len(self.layers[name])}"
                )


def contiguous(num_experts: int, world_size: int) -> LayerPlacement:
    """Upstream's: experts in rising number, as even as E and R allow, the first ranks one more.

    >>> contiguous(5, 2)
    ((0,), (0,), (0,), (1,), (1,))
    """
    if world_size > num_experts:
        raise ValueError(
            f"the ranks must not outnumber the experts without a placement that holds replicas: "
            f"{world_size} ranks, {num_experts} experts"
        )
    share, more = divmod(num_experts, world_size)
    counts = [share + (rank < more) for rank in range(world_size)]
    return tuple((rank,) for rank, count in enumerate(counts) for _ in range(count))


def experts_of_rank(ranks_of_experts: Sequence[Sequence[int]], rank: int) -> tuple[int, ...]:
    """The experts that lie on `rank`, rising.

    >>> experts_of_rank(((0,), (1,), (0, 1)), 1)
    (1, 2)
    """
    return tuple(expert for expert, ranks in enumerate(ranks_of_experts) if rank in ranks)


def save_placement(path: str | os.PathLike, placement: Placement) -> None:
    """Write `placement` to `path`."""
    content = {
        "world_size": placement.world_size,
        "method": placement.method,
        "layers": {name: [list(ranks) for ranks in layer] for name, layer in placement.layers.items()},
    }
    write_json(path, content, indent=None)


def load_placement(path: str | os.PathLike) -> Placement:
    """Read a placement; ValueError names the file and what is wrong in it."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a placement file: {getattr(error, 'strerror', None) or error}") from error
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(content: Any) -> Placement:
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict) or not content["layers"]:
        raise ValueError('a placement must be a JSON object with "world_size" and "layers"')
    world_size: Any = content.get("world_size")
    if not _is_number(world_size) or world_size < 1:
        raise ValueError(f"world_size must be a whole number of at least 1, got {_shown(world_size)}")
    layers = {}
    for name, ranks_of_experts in content["layers"].items():
        if not isinstance(ranks_of_experts, list) or not ranks_of_experts:
            raise ValueError(f"placement of {name[:80]}: must be a list with the ranks of each expert")
        for expert, ranks in enumerate(ranks_of_experts):
            if not isinstance(ranks, list) or not all(_is_number(rank) for rank in ranks):
                found = _shown(ranks)
                raise ValueError(f"placement of {name[:80]}: expert {expert} must have a list of ranks, got {found}")
        layers[name] = tuple(tuple(ranks) for ranks in ranks_of_experts)
    return Placement(world_size, layers, str(content.get("method", "unknown"))[:100])


def _shown(value: Any) -> str:
    """For an error's message, whatever a file holds."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a longer number"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31
