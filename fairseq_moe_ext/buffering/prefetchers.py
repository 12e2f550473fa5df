"""Guesses which experts the next calls of a run will want, while a call is under way; by what the replay asks.

A prefetcher sees no weights: it is played over a recorded run (replay.py), and only the oracle looks ahead in it.

Legend: E = experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from fairseq_moe_ext.buffering.habits import Habits, in_order
from fairseq_moe_ext.buffering.model_calls import ModelCall, following_layers

Key = tuple[str, int]  # a layer's name, an expert's number


class Prefetcher(Protocol):
    """is_late: it knows only when a call is done, not with its gate."""

    is_late: bool

    def wanted(self, number: int) -> Iterable[Key]:
        """While call `number` is under way: experts of later calls, best first, resident or not."""


def heaviest_first(load: np.ndarray) -> list[int]:
    """The experts with load (E,) above 0, largest first; equals by rising number."""
    order = np.argsort(-load.astype(np.float64), kind="stable")
    return order[: np.count_nonzero(load)].tolist()


class Nothing:
    """No prefetch."""

    is_late = False

    def wanted(self, number: int) -> Iterable[Key]:
        """As `Prefetcher` has it."""
        return ()


class Oracle:
    """Knows the next `ahead` calls, None: all; of each layer the first of them."""

    is_late = False

    def __init__(self, calls: Sequence[ModelCall], ahead: int | None = 1):
        self._calls, self._ahead = calls, len(calls) if ahead is None else ahead

    def wanted(self, number: int) -> Iterable[Key]:
        """As `Prefetcher` has it."""
        seen = set()
        for call in self._calls[number + 1 : number + 1 + self._ahead]:
            if call.layer not in seen:
                for expert in heaviest_first(call.load):
                    yield call.layer, expert
            seen.add(call.layer)


class NextLayers:
    """As it is served (`--expert-prefetch layers`): of the layers that come next, in order, the experts that were
    wanted in at least half of their recent calls."""

    is_late = False

    def __init__(self, calls: Sequence[ModelCall]):
        self._calls = calls
        self._following = in_order(list(dict.fromkeys(call.layer for call in calls)))
        self._habits = {call.layer: Habits(len(call.load)) for call in calls}
        self._seen = 0

    def wanted(self, number: int) -> Iterable[Key]:
        """As `Prefetcher` has it."""
        for call in self._calls[self._seen : number + 1]:
            self._habits[call.layer].add(call.load.tolist())
        self._seen = number + 1
        for layer in self._following[self._calls[number].layer]:
            for expert in self._habits[layer].likely():
                yield layer, expert


class LastStep:
    """The experts of the following layer's last call, its heaviest first."""

    is_late = False

    def __init__(self, calls: Sequence[ModelCall]):
        self._calls, self._following = calls, following_layers(calls)
        self._last: dict[str, np.ndarray] = {}
        self._seen = 0

    def wanted(self, number: int) -> Iterable[Key]:
        """As `Prefetcher` has it."""
        for call in self._calls[self._seen : number + 1]:
            self._last[call.layer] = call.load
        self._seen = number + 1
        layer = self._following[number]
        if layer in self._last:
            for expert in heaviest_first(self._last[layer]):
                yield layer, expert


class HotSet:
    """The experts of the following layer that another run chose most; totals: layer -> its loads (E,)."""

    is_late = False

    def __init__(self, calls: Sequence[ModelCall], totals: Mapping[str, np.ndarray]):
        self._following = following_layers(calls)
        self._ranked = {layer: heaviest_first(total) for layer, total in totals.items()}

    def wanted(self, number: int) -> Iterable[Key]:
        """As `Prefetcher` has it."""
        layer = self._following[number]
        for expert in self._ranked.get(layer, ()):
            yield layer, expert


class Predicted:
    """What a predictor said of the following layer: scores, for every call None or (layer, (E,) expected rows)."""

    def __init__(self, scores: Sequence[tuple[str, np.ndarray] | None], is_late: bool):
        self._scores, self.is_late = scores, is_late

    def wanted(self, number: int) -> Iterable[Key]:
        """As `Prefetcher` has it."""
        if self._scores[number] is not None:
            layer, expected = self._scores[number]
            for expert in heaviest_first(expected):
                yield layer, expert
