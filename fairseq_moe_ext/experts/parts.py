"""An expert's parts, packed for many experts, and their names in upstream's state dict.

Legend: H = local experts, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

# packed parameter -> its name under `experts.{j}.` in upstream's state dict
EXPERT_KEYS = {"fc1_weight": "fc1.weight", "fc1_bias": "fc1.bias", "fc2_weight": "fc2.weight", "fc2_bias": "fc2.bias"}


def packed_shapes(experts: int, model_dim: int, hidden_dim: int) -> dict[str, tuple[int, ...]]:
    """Of the packed parameters for so many experts, in the order of EXPERT_KEYS."""
    return {
        "fc1_weight": (experts, hidden_dim, model_dim),
        "fc1_bias": (experts, hidden_dim),
        "fc2_weight": (experts, model_dim, hidden_dim),
        "fc2_bias": (experts, model_dim),
    }


class ExpertKeys:
    """Which keys of a state dict are a layer's experts, and what is wrong with them.

    local: the numbers of the experts that are wanted. shapes: of the packed parameters.
    """

    def __init__(self, num_experts: int, local: Sequence[int], shapes: Mapping[str, tuple[int, ...]]):
        self._num_experts = num_experts
        self._local = local
        self._shapes = shapes

    def fitting(
        self, state_dict: Mapping[str, Tensor], prefix: str, missing_keys: list[str], error_msgs: list[str]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """(packed parameter, index in it, the state dict's tensor) of every expert; the rest goes to the two lists."""
        for name, key in EXPERT_KEYS.items():
            shape = self._shapes[name][1:]
            for index, expert in enumerate(self._local):
                full_key = f"{prefix}{expert}.{key}"
                if full_key not in state_dict:
                    missing_keys.append(full_key)
                elif state_dict[full_key].shape != shape:
                    error_msgs.append(
                        f"{full_key}: expected shape {tuple(shape)}, got {tuple(state_dict[full_key].shape)}"
                    )
                else:
                    yield name, index, state_dict[full_key]

    def of_every_expert(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> list[list[Tensor]] | None:
        """Per expert its parts in the order of EXPERT_KEYS; None where one is missing or does not fit, an error whether
        or not the loading is strict. The lists are those of PyTorch's `_load_from_state_dict`."""
        missing: list[str] = []
        misfits: list[str] = []
        parts: list[list[Tensor]] = [[] for _ in self._local]
        for _, index, tensor in self.fitting(state_dict, prefix, missing, misfits):
            parts[index].append(tensor)
        missing_keys += missing
        error_msgs += misfits
        error_msgs += [f"{key}: missing, and these experts have no values of their own" for key in missing]
        if strict:
            unexpected_keys += self.unexpected(state_dict, prefix)
        return None if missing or misfits else parts

    def unexpected(self, state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
        """Keys under `prefix` that are no expert's of this layer."""
        known = re.compile(rf"{re.escape(prefix)}(\d+)\.(?:{'|'.join(map(re.escape, EXPERT_KEYS.values()))})$")
        matches = {key: known.match(key) for key in state_dict if key.startswith(prefix)}
        return [key for key, match in matches.items() if match is None or int(match.group(1)) >= self._num_experts]
