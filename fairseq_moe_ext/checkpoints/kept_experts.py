"""Which of a model's experts are kept where it is pruned for a pair of languages, and the state without the others.

What is left of a layer is a smaller layer: its experts are numbered anew from 0, and its gate has their rows alone, so
that softmax and choices run over what is left (arXiv 2212.09811, section 3). Files that say something of experts name
them by the numbers that they have in the whole model.

Legend: E = experts of a whole layer, k = those that are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_moe_ext.bounded_json import read_json
from fairseq_moe_ext.buffering.profile import is_name, is_whole
from fairseq_moe_ext.buffering.published_sets import check_published_sets, load_published_sets
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY, GATE_KEY

KEPT = "moe_kept_experts"  # in a checkpoint's extra_state: that it is a pruned one


def is_of_encoder(name: str) -> bool:
    """Whether a layer is an encoder's, whose experts are kept for the source's language."""
    return name.startswith("encoder.")


@dataclass(frozen=True)
class KeptExperts:
    """languages: source and target that they are kept for, "" and "" of a language model. num_experts: E. layers: the
    rising numbers of those that are kept, by the layer's name in the checkpoint. ValueError where these do not fit."""

    languages: tuple[str, str]
    num_experts: int
    layers: dict[str, tuple[int, ...]]

    def __post_init__(self):
        for name, numbers in self.layers.items():
            if not numbers:
                raise ValueError(f"{name} must keep at least one expert, got none for {self.languages}")
            if list(numbers) != sorted(set(numbers)):
                raise ValueError(f"{name} must keep experts in rising order, each once, got {numbers}")
            if numbers[0] < 0 or numbers[-1] >= self.num_experts:
                raise ValueError(f"{name} must keep experts below {self.num_experts}, got {numbers}")

    @classmethod
    def from_json(cls, value: Any) -> KeptExperts:
        """What `dataclasses.asdict` makes of one; ValueError where it is something else."""
        fits = isinstance(value, dict) and set(value) == {"languages", "num_experts", "layers"}
        if fits:
            languages, count, layers = value["languages"], value["num_experts"], value["layers"]
            fits = isinstance(languages, list | tuple) and len(languages) == 2 and all(map(is_name, languages))
            fits = fits and type(count) is int and 0 < count < 1 << 20 and isinstance(layers, dict) and bool(layers)
            fits = fits and all(
                isinstance(numbers, list | tuple) and all(map(is_whole, numbers)) for numbers in layers.values()
            )
        if not fits:
            raise ValueError(f"kept experts must have languages, num_experts and layers, got {value!r:.80}")
        return cls(tuple(languages), count, {str(name): tuple(numbers) for name, numbers in layers.items()})

    @property
    def counts(self) -> dict[str, int]:
        """How many each layer keeps."""
        return {name: len(numbers) for name, numbers in self.layers.items()}

    def spread(self, name: str, values: Iterable[float]) -> list:
        """k values of a layer's experts -> E, zero for those that are not kept."""
        found = [0] * self.num_experts
        for number, value in zip(self.layers[name], values, strict=True):
            found[number] = value
        return found

    def spread_array(self, name: str, values: np.ndarray, axis: int = 0) -> np.ndarray:
        """The same along one axis of an array."""
        shape = list(values.shape)
        shape[axis] = self.num_experts
        found = np.zeros(shape, values.dtype)
        found[(slice(None),) * axis + (np.array(self.layers[name], np.int64),)] = values
        return found

    def check_languages(self, source: str, target: str, why: str) -> None:
        """ValueError, which says `why` only they are there, for other languages than those."""
        options = ("--source-lang", "--target-lang")
        for name, wanted, given in zip(options, self.languages, (source, target), strict=True):
            if wanted != given:
                raise ValueError(f"{name} must be {wanted}, {why}, got {given or 'none'}")


def read_kept(
    option: str, path: str | os.PathLike, languages: tuple[str, str], num_experts: Mapping[str, int]
) -> KeptExperts:
    """What the file of experts by language at `path`, which `option` named, keeps of a model for a pair of languages.

    num_experts: E by layer, in the order of buffering/published_sets.py. ValueError names the option, the file and what
    is wrong, the languages that it has among it.
    """
    if not num_experts:
        raise ValueError(f"{option} needs a model with experts, got {path} for one without")
    check_sets(option, path, [languages[not is_of_encoder(name)] for name in num_experts])
    try:
        sets = load_published_sets(path, num_experts)
        layers = {name: sets[languages[not is_of_encoder(name)]][name] for name in num_experts}
        return KeptExperts(languages, max(num_experts.values(), default=0), layers)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error


def check_sets(option: str, path: str | os.PathLike, languages: Iterable[str]) -> None:
    """ValueError where the file at `path` is none of experts by language, or lacks one of these."""
    try:
        sets = read_json(path)
        check_published_sets(sets)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{option} {path}: not sets of experts by language (.json): {said}") from error
    for language in languages:
        if language not in sets:
            known = ", ".join(map(repr, sorted(sets)[:8])) + (f" and {len(sets) - 8} more" if len(sets) > 8 else "")
            raise ValueError(f"{option} {path} must have the language {language!r}, it has {known}")


def cut_key(key: str, layers: Mapping[str, Sequence[int]]) -> str | None:
    """The key of an expert's tensor among those that are kept, None of another's; a key that is no expert's stays.

    >>> cut_key("decoder.layers.1.moe_layer.experts.5.fc1.bias", {"decoder.layers.1.moe_layer": (2, 5)})
    'decoder.layers.1.moe_layer.experts.1.fc1.bias'
    """
    match = EXPERT_KEY.match(key)
    if match is None:
        return key
    prefix, number, rest = match.groups()
    numbers = layers.get(_layer(prefix.removesuffix(".experts.")), ())
    return f"{prefix}{numbers.index(int(number))}{rest}" if int(number) in numbers else None


def rows_of_gate(key: str, layers: Mapping[str, Sequence[int]]) -> Tensor | None:
    """Which rows (k,) int64 a gate's weight keeps; None of another tensor."""
    match = GATE_KEY.match(key)
    return None if match is None else torch.tensor(layers.get(_layer(match.group(1)), ()), dtype=torch.int64)


def cut_experts(state: dict[str, Tensor], kept: KeptExperts) -> None:
    """Leave in `state`, in place, the experts that are kept and their rows of the gates; no other expert is read.

    CheckpointError where the state has other layers, or gates of another number of experts.
    """
    gates = {_layer(match.group(1)): state[match.string].size(0) for match in map(GATE_KEY.match, state) if match}
    if gates != dict.fromkeys(kept.layers, kept.num_experts):
        raise CheckpointError(
            f"the experts to keep must be of its {len(gates)} MoE layers of {max(gates.values(), default=0)} experts, "
            f"got those of {len(kept.layers)} layers of {kept.num_experts}"
        )
    items = list(state.items())
    state.clear()
    for key, tensor in items:
        rows = rows_of_gate(key, kept.layers)
        new = cut_key(key, kept.layers)
        if new is not None:
            state[new] = tensor if rows is None else tensor[rows]


def _layer(name: str) -> str:
    """CMR's state has every MoE layer under a second name, too."""
    return name.replace(".cmr_layer.", ".")
