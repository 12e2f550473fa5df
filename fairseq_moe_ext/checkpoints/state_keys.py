"""What the keys of a model's state say of its MoE layers.

Legend: E = experts of the model (upstream's `moe_expert_count`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from fairseq_moe_ext.checkpoints.errors import CheckpointError

GATE_KEY = re.compile(r"^(.*\.moe_layer)\.gate\.wg\.weight$")
EXPERT_KEY = re.compile(r"^(.*\.moe_layer\.experts\.)(\d+)(\..+)$")

_DENSE_KEY = re.compile(
    r"^(?!.*\.experts\.).*(_proj|fc1|fc2|embed_tokens|output_projection|project_(in|out)_dim)\.weight$"
)


def is_dense_matrix(key: str, shape: Sequence[int]) -> bool:
    """Whether it is the weight of a linear layer or embedding beside the experts: no gate, no positions."""
    return len(shape) == 2 and _DENSE_KEY.match(key) is not None


def is_expert_key(key: str) -> bool:
    """Upstream's rule for what stands in rank files."""
    return "expert" in key and "expert_centroids" not in key


def moe_layer_numbers(model: Mapping[str, Tensor], side: str) -> list[int]:
    """Which layers of `side` (`encoder` or `decoder`) are MoE layers."""
    layer = re.compile(rf"{side}\.layers\.(\d+)\.moe_layer")
    gates = [match.group(1) for match in map(GATE_KEY.match, model) if match]
    return sorted(int(match.group(1)) for match in map(layer.fullmatch, gates) if match)


def layer_numbers(model: Mapping[str, Tensor], side: str) -> list[int]:
    """The numbers of the layers that `side` has."""
    layer = re.compile(rf"{side}\.layers\.(\d+)\.")
    return sorted({int(match.group(1)) for match in map(layer.match, model) if match})


def layer_count(model: Mapping[str, Tensor], side: str) -> int:
    """How many layers `side` has."""
    return len(layer_numbers(model, side))


def layers_of_hidden_dim(model: Mapping[str, Tensor], side: str, hidden_dim: int) -> list[int]:
    """Which layers of `side` have a dense feed-forward of that hidden dim."""
    weights = {number: model.get(f"{side}.layers.{number}.fc1.weight") for number in layer_numbers(model, side)}
    return [number for number, weight in weights.items() if weight is not None and weight.shape[:1] == (hidden_dim,)]


def expert_counts(model: Mapping[str, Tensor]) -> dict[str, int]:
    """Each MoE layer's experts, by the gates' shape; CheckpointError, which names no file, where one has no shape."""
    counts = {}
    for key, tensor in model.items():
        if match := GATE_KEY.match(key):
            if tensor.dim() != 2:
                raise CheckpointError(f"{key} must have 2 dims, experts and model dim, got {tuple(tensor.shape)}")
            counts[match.group(1)] = tensor.size(0)
    return counts


def expert_count(model: Mapping[str, Tensor]) -> int:
    """E, by the gates' shape; 0 in a dense model. CheckpointError, which names no file, where the gates disagree."""
    counts = set(expert_counts(model).values())
    if len(counts) > 1:
        raise CheckpointError(f"the gates of one model must score the same number of experts, found {sorted(counts)}")
    return counts.pop() if counts else 0


def experts_by_layer(model: Mapping[str, Tensor]) -> dict[str, int]:
    """E of every MoE layer by the name that the model has for it, an encoder's layers first, both in their order."""
    counts = expert_counts(model)
    names = (f"{side}.layers.{n}.moe_layer" for side in ("encoder", "decoder") for n in moe_layer_numbers(model, side))
    return {name: counts[name] for name in names}
