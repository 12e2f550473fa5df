"""What a served run recorded of its experts' inputs, its gates' choices and a sample of the gates' inputs.

The file is an .npz of bounded size (docs/recording.md): it depends on the model and the number of languages, not on how
much was served. Several records are one by their sums.

Legend: L = MoE layers, E = experts of a layer, G = languages, K = choices per token, S = sampled tokens, D = model dim,
F = hidden dim.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fairseq_moe_ext.atomic_file import write_bytes
from fairseq_moe_ext.bounded_json import read_regular
from fairseq_moe_ext.npz_reading import read_arrays, reason_of

VERSION = 1
MOST_SAMPLED = 2048  # S, tokens of a layer
MOST_HIDDEN = 512  # rows of an expert whose hidden features are recorded ...
MOST_CALLS = 32  # ... in at most so many calls
_MOST, _LONGEST_NAME = 10_000, 500  # layers, experts or languages; letters
_LISTED = 10_000_000  # bytes of the archive's list of arrays


@dataclass(frozen=True)
class Inputs:
    """Of a linear layer of every expert: rows (E,) int64, mean (E, X) float32 of its inputs, and square (E, X) float32
    of their squares; X is D or F. Zero where an expert had no row."""

    rows: np.ndarray
    mean: np.ndarray
    square: np.ndarray

    def plus(self, other: Inputs) -> Inputs:
        """Both together."""
        rows = self.rows + other.rows
        share = (other.rows / np.maximum(rows, 1))[:, None]
        mean, square = (
            (getattr(self, name) * (1 - share) + getattr(other, name) * share).astype(np.float32)
            for name in ("mean", "square")
        )
        return Inputs(rows, mean, square)

    def of_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """mean and square (X,) float32 over the rows of all experts."""
        weights = self.rows / max(1, self.rows.sum())
        return (weights @ self.mean).astype(np.float32), (weights @ self.square).astype(np.float32)


@dataclass(frozen=True)
class Choices:
    """What a gate chose, before any capacity, of tokens that are no padding: per language first (G, E) int64 tokens
    whose first choice an expert is, confidence (G, E) float64 the sum of the gate's probability there, ends (G, E)
    int64 first choices at positions of a decoder that emit the end of sentence."""

    first: np.ndarray
    confidence: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Sample:
    """Tokens drawn without regard to anything, by rising keys (S,) uint64: inputs (S, D) float16 of the gate, experts
    (S, K) int32 that it chose, languages (S,) int32. Layers of one stack have the same tokens."""

    keys: np.ndarray
    inputs: np.ndarray
    experts: np.ndarray
    languages: np.ndarray

    def plus(self, other: Sample, most: int = MOST_SAMPLED) -> Sample:
        """The `most` smallest keys of both."""
        order = np.argsort(np.concatenate((self.keys, other.keys)), kind="stable")[:most]
        return Sample(
            *(np.concatenate((getattr(self, each.name), getattr(other, each.name)))[order] for each in fields(self))
        )


@dataclass(frozen=True)
class LayerRecord:
    """One MoE layer: fc1's inputs of all rows, fc2's of the first rows of every expert, the gate's choices and a sample
    of its inputs. ValueError where these do not fit together."""

    fc1: Inputs
    fc2: Inputs
    choices: Choices
    sample: Sample

    def __post_init__(self):
        (experts,), languages = self.fc1.rows.shape[:1], len(self.choices.first)
        model_dim, hidden_dim = self.fc1.mean.shape[-1], self.fc2.mean.shape[-1]
        sampled, chosen = len(self.sample.keys), self.sample.experts.shape[-1]
        wanted = {
            "fc1.rows": ("i8", (experts,)), "fc1.mean": ("f4", (experts, model_dim)),
            "fc1.square": ("f4", (experts, model_dim)), "fc2.rows": ("i8", (experts,)),
            "fc2.mean": ("f4", (experts, hidden_dim)), "fc2.square": ("f4", (experts, hidden_dim)),
            "choices.first": ("i8", (languages, experts)), "choices.confidence": ("f8", (languages, experts)),
            "choices.ends": ("i8", (languages, experts)), "sample.keys": ("u8", (sampled,)),
            "sample.inputs": ("f2", (sampled, model_dim)), "sample.experts": ("i4", (sampled, chosen)),
            "sample.languages": ("i4", (sampled,)),
        }  # fmt: skip
        for name, (dtype, shape) in wanted.items():
            part, _, field = name.partition(".")
            found = getattr(getattr(self, part), field)
            if found.dtype != np.dtype(dtype) or found.shape != shape:
                raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, got {found.dtype} {found.shape}")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.fc1.rows)

    def for_languages(self, places: Sequence[int], languages: int) -> LayerRecord:
        """As one of so many languages has it, of which this record's are those at `places`."""
        at = np.asarray(places, dtype=np.int32)
        choices = []
        for each in fields(self.choices):
            here = getattr(self.choices, each.name)
            wide = np.zeros((languages, self.num_experts), here.dtype)
            wide[at] = here
            choices.append(wide)
        kept = self.sample
        sample = Sample(kept.keys, kept.inputs, kept.experts, at[kept.languages])
        return LayerRecord(self.fc1, self.fc2, Choices(*choices), sample)

    def plus(self, other: LayerRecord) -> LayerRecord:
        """Both together, of the same languages."""
        choices = Choices(
            *(getattr(self.choices, each.name) + getattr(other.choices, each.name) for each in fields(Choices))
        )
        return LayerRecord(
            self.fc1.plus(other.fc1), self.fc2.plus(other.fc2), choices, self.sample.plus(other.sample)
        )


@dataclass(frozen=True)
class Record:
    """languages: of an encoder's layers those of its sources, of a decoder's those of its targets; a language model has
    one, "". layers: by their names in the checkpoint."""

    languages: tuple[str, ...]
    layers: dict[str, LayerRecord]


def merge_records(records: Sequence[Record]) -> Record:
    """What one run would have recorded that served all of it, but for the rows of fc2, which may be more.

    ValueError where they are of different models.
    """
    languages = tuple(dict.fromkeys(language for record in records for language in record.languages))
    layers: dict[str, LayerRecord] = {}
    for record in records:
        if record.layers.keys() != records[0].layers.keys():
            raise ValueError(
                f"records to merge must be of one model; they have the layers {', '.join(records[0].layers)} and "
                f"{', '.join(record.layers)}"
            )
        places = [languages.index(language) for language in record.languages]
        for name, layer in record.layers.items():
            wide = layer.for_languages(places, len(languages))
            if name in layers:
                ours, theirs = _dims(layers[name]), _dims(wide)
                if ours != theirs:
                    raise ValueError(f"records to merge must be of one model; {name} has (E, D, F) {ours} and {theirs}")
                wide = layers[name].plus(wide)
            layers[name] = wide
    return Record(languages, layers)


def _dims(layer: LayerRecord) -> tuple[int, int, int]:
    return layer.num_experts, layer.fc1.mean.shape[1], layer.fc2.mean.shape[1]


_PARTS: dict[str, type] = {"fc1": Inputs, "fc2": Inputs, "choices": Choices, "sample": Sample}


def pack_record(record: Record) -> bytes:
    """The content of a record's file."""
    arrays = {
        "version": np.array([VERSION], np.int64),
        "languages": np.array(record.languages, dtype=np.str_),
        "names": np.array(list(record.layers), dtype=np.str_),
    }
    for number, layer in enumerate(record.layers.values()):
        for part, kind in _PARTS.items():
            for each in fields(kind):
                arrays[f"{number}_{part}_{each.name}"] = getattr(getattr(layer, part), each.name)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpack_record(content: bytes) -> Record:
    """What `pack_record` was given; ValueError where an array is not what it must be."""
    arrays = read_arrays(content, _wanted, len(content), kinds="iufU", most_listed=_LISTED)
    version = arrays.get("version")
    if version is None or version.shape != (1,) or version.dtype.kind != "i":
        raise ValueError("it has no version")
    if version[0] != VERSION:
        raise ValueError(f"its version must be {VERSION}, got {version[0]}")
    languages, names = _names(arrays, "languages"), _names(arrays, "names")
    if not names:
        raise ValueError("it has no layer")
    layers = {}
    for number, name in enumerate(names):
        layers[name] = layer = _layer(arrays, number)
        _check_numbers(name, layer, len(languages))
    return Record(languages, layers)


def _wanted(names: Iterable[str]) -> Iterable[str]:
    return names


def _names(arrays: dict[str, np.ndarray], name: str) -> tuple[str, ...]:
    found = arrays.get(name)
    if found is None or found.ndim != 1 or found.dtype.kind != "U" or len(found) > _MOST:
        raise ValueError(f"{name} must be at most {_MOST:,} names")
    names = tuple(found.tolist())
    if len(set(names)) < len(names) or not all(each.isprintable() and len(each) <= _LONGEST_NAME for each in names):
        raise ValueError(f"{name} must be different, of at most {_LONGEST_NAME} printable letters each")
    return names


def _layer(arrays: dict[str, np.ndarray], number: int) -> LayerRecord:
    parts: dict[str, Any] = {}
    for part, kind in _PARTS.items():
        names = [f"{number}_{part}_{each.name}" for each in fields(kind)]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"it has no array {missing[0]}")
        parts[part] = kind(*(arrays[name] for name in names))
    return LayerRecord(**parts)


def _check_numbers(name: str, layer: LayerRecord, languages: int) -> None:
    """ValueError where a recorder cannot have written such numbers."""
    sample, choices = layer.sample, layer.choices
    if not 0 < layer.num_experts <= _MOST or len(choices.first) != languages or len(sample.keys) > MOST_SAMPLED:
        raise ValueError(
            f"{name} must have at most {_MOST:,} experts and {MOST_SAMPLED} sampled tokens, and {languages} languages, "
            f"got {layer.num_experts}, {len(sample.keys)} and {len(choices.first)}"
        )
    counts = (layer.fc1.rows, layer.fc2.rows, choices.first, choices.ends)
    sums = (layer.fc1.square, layer.fc2.square, choices.confidence)
    if any(each.size and each.min() < 0 for each in (*counts, *sums)):
        raise ValueError(f"{name} must have no negative count and no negative square")
    if not all(np.isfinite(each).all() for each in (*sums, layer.fc1.mean, layer.fc2.mean)):
        raise ValueError(f"{name} must have finite means and sums")
    for found, most in ((sample.experts, layer.num_experts), (sample.languages, languages)):
        if found.size and not 0 <= found.min() <= found.max() < most:
            raise ValueError(
                f"{name} must have sampled experts below {layer.num_experts} and languages below {languages}"
            )


def save_record(path: str | os.PathLike, record: Record, flag: str = "") -> None:
    """Write `record` to `path`, which the option `flag` named."""
    write_bytes(path, pack_record(record), flag)


def load_record(path: str | os.PathLike) -> Record:
    """Read a record; ValueError names the file where it is none."""
    try:
        return unpack_record(read_regular(path))
    except Exception as error:  # zipfile and numpy raise a dozen types at damaged files
        raise ValueError(f"{path}: not a record (.npz as --moe-record writes it): {reason_of(error)}") from error


def fingerprint(path: str | os.PathLike) -> str:
    """Of a record's file, sha256 in hex."""
    return hashlib.sha256(read_regular(path)).hexdigest()
