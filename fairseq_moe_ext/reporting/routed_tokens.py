"""Which experts ran every token of sentences that were scored, and how far two services of them agree.

Legend: T = tokens of all sentences of a layer's side, K = choices per token.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NONE = -1  # in an expert's place: the assignment did not run


@dataclass(frozen=True)
class RoutedTokens:
    """sentences: their numbers, rising. lengths: side (`encoder`, `decoder`) -> tokens of each. experts: a layer's
    name, which begins with its side -> (T, K) int16, first choice first, in the sentences' order.
    """

    sentences: np.ndarray
    lengths: Mapping[str, np.ndarray]
    experts: Mapping[str, np.ndarray]

    @classmethod
    def of_batches(
        cls,
        sentences: Sequence[int],
        lengths: Mapping[str, Sequence[int]],
        experts: Mapping[str, Sequence[np.ndarray]],
    ) -> RoutedTokens:
        """The same in the order of the batches, an array of each layer per batch."""
        order = np.argsort(np.array(sentences, dtype=np.int64), kind="stable")
        counts = {side: np.array(each, dtype=np.int64) for side, each in lengths.items()}
        found = {}
        for name, parts in experts.items():
            of_side = counts[side_of(name)]
            starts = of_side.cumsum() - of_side
            tokens = [np.arange(starts[place], starts[place] + of_side[place]) for place in order]
            found[name] = np.concatenate(parts)[np.concatenate(tokens)]
        numbers = np.array(sentences, dtype=np.int64)[order]
        return cls(numbers, {side: each[order] for side, each in counts.items()}, found)

    def pack(self) -> bytes:
        """The content of a file."""
        file = io.BytesIO()
        arrays = {f"lengths {side}": each for side, each in self.lengths.items()}
        arrays |= {f"experts {name}": each for name, each in self.experts.items()}
        np.savez_compressed(file, sentences=self.sentences, **arrays)
        return file.getvalue()

    @classmethod
    def unpack(cls, content: bytes) -> RoutedTokens:
        """What `pack` made."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            parts: dict[str, dict[str, np.ndarray]] = {"lengths": {}, "experts": {}}
            for key in arrays.files:
                kind, _, name = key.partition(" ")
                if name:
                    parts[kind][name] = arrays[key]
            return cls(arrays["sentences"], **parts)


@dataclass(frozen=True)
class Agreement:
    """Of one layer: how many tokens, and the shares (0 to 1) of those whose experts are the same set, and whose first
    choice is the same."""

    layer: str
    tokens: int
    same_experts: float
    same_first_choice: float


def side_of(layer: str) -> str:
    """`encoder` or `decoder`."""
    return layer.partition(".")[0]


def agreements(a: RoutedTokens, b: RoutedTokens) -> list[Agreement]:
    """Of every layer that both have; ValueError where they are not of the same tokens."""
    if not np.array_equal(a.sentences, b.sentences):
        raise ValueError(f"both must serve the same sentences, got {len(a.sentences)} and {len(b.sentences)}")
    for side, lengths in a.lengths.items():
        if not np.array_equal(lengths, b.lengths[side]):
            totals = f"{lengths.sum():,} and {b.lengths[side].sum():,}"
            raise ValueError(f"both must score the same tokens, got {totals} in the {side}")
    return [_agreement(name, a.experts[name], b.experts[name]) for name in a.experts if name in b.experts]


def _agreement(layer: str, a: np.ndarray, b: np.ndarray) -> Agreement:
    choices = max(a.shape[1], b.shape[1])
    a, b = (np.pad(each, ((0, 0), (0, choices - each.shape[1])), constant_values=NONE) for each in (a, b))
    same_experts = (np.sort(a, axis=1) == np.sort(b, axis=1)).all(axis=1)
    return Agreement(layer, len(a), float(same_experts.mean()), float((a[:, 0] == b[:, 0]).mean()))
