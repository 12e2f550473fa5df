"""Which experts a language needs, merged from recorded runs (`fairseq-moe profile`), and the file that says so.

Legend: G = languages, E = experts of a layer. An encoder's layers know the languages of sources, a decoder's those of
targets; a language model has one, "". The file is JSON: {"version": 1, "languages": [...], "layers": {name: {"tokens":
[G], "importance": [G][E], "ends": [G][E], "first": [G][E], "load": [E]}}}.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.bounded_json import MOST_VALUES, read_json
from fairseq_moe_ext.recording import Choices, Record

VERSION = 1
_MOST, _LONGEST_NAME, _MOST_TOKENS = 10_000, 500, 1 << 62  # layers, experts or languages; letters; of a language
_FIELDS = ("tokens", "importance", "ends", "first", "load")


def importance(choices: Choices) -> np.ndarray:
    """(G, E) float64: top1 * exp(confidence). top1: the share of a language's tokens whose first choice the expert is;
    confidence: the mean of the gate's probability there. Zeros for a language without a token.

    Source: "Memory-efficient NLLB-200" (arXiv 2212.09811), its importance of an expert.
    """
    tokens = choices.first.sum(axis=1, keepdims=True)
    top1 = choices.first / np.maximum(tokens, 1)
    confidence = choices.confidence / np.maximum(choices.first, 1)
    return top1 * np.exp(confidence)


@dataclass(frozen=True)
class LayerProfile:
    """One layer: tokens (G,) int64, importance (G, E) float64, ends (G, E) int64 first choices where a decoder emits
    the end of sentence, first (G, E) int64 first choices, load (E,) int64 rows that an expert computed, of all choices
    and languages. ValueError where these do not fit together."""

    tokens: np.ndarray
    importance: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    load: np.ndarray

    def __post_init__(self):
        shape = self.importance.shape
        fits = len(shape) == 2 and 0 < shape[1] <= _MOST and self.ends.shape == self.first.shape == shape
        if not fits or self.tokens.shape != shape[:1] or self.load.shape != shape[1:]:
            found = ", ".join(f"{name} {getattr(self, name).shape}" for name in _FIELDS)
            raise ValueError(
                f"a layer must have importance, ends and first (G, E) of at most {_MOST:,} experts, tokens (G,) and "
                f"load (E,), got {found}"
            )

    @property
    def activity(self) -> np.ndarray:
        """(G, E) float64: the share of a language's tokens whose first choice the expert is."""
        return self.first / np.maximum(self.tokens, 1)[:, None]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.importance.shape[1]


@dataclass(frozen=True)
class Profile:
    """languages: G names. layers: by their names in the checkpoint."""

    languages: tuple[str, ...]
    layers: dict[str, LayerProfile]

    def languages_of(self, layer: str) -> tuple[str, ...]:
        """Those of which the layer had tokens."""
        tokens = self.layers[layer].tokens
        return tuple(each for each, count in zip(self.languages, tokens, strict=True) if count)

    def of_languages(self, layer: str, languages: Sequence[str]) -> np.ndarray:
        """(E,) float64: the layer's importance, summed over `languages`; ValueError for one that it had no token of."""
        known = self.languages_of(layer)
        for language in languages:
            if language not in known:
                raise ValueError(f"it has no tokens of {language!r} in {layer}, only of {listed(known)}")
        return self.layers[layer].importance[[self.languages.index(each) for each in languages]].sum(axis=0)


def profile_of(record: Record) -> Profile:
    """What a record, merged or not, says."""
    layers = {}
    for name, layer in record.layers.items():
        choices = layer.choices
        tokens = choices.first.sum(axis=1)
        layers[name] = LayerProfile(tokens, importance(choices), choices.ends, choices.first, layer.fc1.rows)
    return Profile(record.languages, layers)


def save_profile(path: str | os.PathLike, profile: Profile, flag: str = "") -> None:
    """Write `profile` to `path`, which the option `flag` named; ValueError where it is more than can be read again."""
    values = sum(3 * layer.importance.size for layer in profile.layers.values())
    if values > MOST_VALUES // 2:
        raise ValueError(
            f"a profile must have at most {MOST_VALUES // 2:,} numbers, got {values:,} of {len(profile.languages)} "
            f"languages"
        )
    layers = {
        name: {field: getattr(layer, field).tolist() for field in _FIELDS} for name, layer in profile.layers.items()
    }
    content = {"version": VERSION, "languages": list(profile.languages), "layers": layers}
    write_json(path, content, flag, indent=None)


def load_profile(path: str | os.PathLike) -> Profile:
    """Read a profile; ValueError names the file and what is wrong in it."""
    try:
        return parse_profile(read_json(path))
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not a profile (.json as fairseq-moe profile writes it): {said}") from error


def parse_profile(content: Any) -> Profile:
    """What the file's JSON says; ValueError."""
    if not isinstance(content, dict) or set(content) != {"version", "languages", "layers"}:
        raise ValueError("it must have a version, languages and layers, and nothing else")
    if not is_whole(content["version"], VERSION) or content["version"] != VERSION:
        raise ValueError(f"its version must be {VERSION}, got {str(content['version'])[:20]}")
    languages, layers = content["languages"], content["layers"]
    if not isinstance(languages, list) or not languages or len(languages) > _MOST or not all(map(is_name, languages)):
        raise ValueError(f"languages must be a list of 1 to {_MOST:,} names")
    if len(set(languages)) < len(languages):
        raise ValueError("each of its languages must stand there once")
    if not isinstance(layers, dict) or not 0 < len(layers) <= _MOST or not all(map(is_name, layers)):
        raise ValueError(f"layers must be 1 to {_MOST:,} layers by name")
    return Profile(tuple(languages), {name: _layer(name, each, len(languages)) for name, each in layers.items()})


def _layer(name: str, content: Any, languages: int) -> LayerProfile:
    if not isinstance(content, dict) or set(content) != set(_FIELDS):
        raise ValueError(f"{name} must have {', '.join(_FIELDS)}, and nothing else")
    tokens = content["tokens"]
    if not isinstance(tokens, list) or len(tokens) != languages or not all(map(is_whole, tokens)):
        raise ValueError(f"{name} must have a whole number of tokens for each of {languages} languages")
    matrices = {}
    wanted = (("importance", _is_share, np.float64), ("ends", is_whole, np.int64), ("first", is_whole, np.int64))
    for field, fits, dtype in wanted:
        rows = content[field]
        if not isinstance(rows, list) or len(rows) != languages or not all(isinstance(row, list) for row in rows):
            raise ValueError(f"{field} of {name} must be a list of numbers for each of {languages} languages")
        if len({len(row) for row in rows}) != 1 or not all(fits(value) for row in rows for value in row):
            raise ValueError(f"{field} of {name} must be finite numbers from 0 on, as many in every language")
        matrices[field] = np.array(rows, dtype)
    try:
        load = content["load"]
        if not isinstance(load, list) or not all(map(is_whole, load)):
            raise ValueError("load must be a whole number for each expert")
        return LayerProfile(np.array(tokens, np.int64), **matrices, load=np.array(load, np.int64))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def is_whole(value: Any, most: int = _MOST_TOKENS) -> bool:
    """A whole number from 0 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_name(value: Any) -> bool:
    """Of a language or a layer."""
    return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_NAME


def listed(names: Sequence[str], most: int = 8) -> str:
    """For an error's message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 3  # at most 1 * e
