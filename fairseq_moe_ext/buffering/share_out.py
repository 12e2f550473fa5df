"""Bytes of fast memory -> experts that each layer keeps, by what a slot more saves there.

Legend: H = local experts of a layer, n = experts that its buffer keeps.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fairseq_moe_ext.byte_sizes import bytes_in_words

Sizes = Mapping[str, int]  # layer -> n


@dataclass(frozen=True)
class LayerCosts:
    """misses (H,): of a buffer that keeps 1 to H experts, of any run or in expectation; None: nothing is known.

    expert_bytes: of one expert, which a miss copies and a slot takes.
    """

    num_experts: int
    expert_bytes: int
    misses: np.ndarray | None = None


def share_out(layers: Mapping[str, LayerCosts], budget: int, taken: Callable[[Sizes], int]) -> dict[str, int]:
    """n of every layer, from 1 to its H, such that `taken`, the bytes of all slots for these n, is at most `budget`.

    The next slot goes where it saves most copied bytes for a byte of memory, over the lower convex hulls of the curves:
    where n is a vertex in every layer, no share-out of as many bytes copies less, and at most one layer has an n
    between two vertices. Equals, and layers without a curve, share evenly. ValueError, with the least that works, where
    one expert each does not fit.

    >>> layers = {"a": LayerCosts(3, 10, np.array([9, 1, 0])), "b": LayerCosts(3, 10, np.array([6, 3, 0]))}
    >>> share_out(layers, 50, taken=lambda sizes: 10 * sum(sizes.values()))
    {'a': 2, 'b': 3}
    """
    everything = {name: layer.num_experts for name, layer in layers.items()}
    if taken(everything) <= budget:  # which needs no slots for experts on their way
        return everything
    sizes = dict.fromkeys(layers, 1)
    least = taken(sizes)
    if least > budget:
        raise ValueError(
            f"must be at least {least}B ({bytes_in_words(least)}) for one expert in each of {len(layers)} layers and "
            f"those on their way, got {budget}B"
        )
    curves = {name: _hull(layer) for name, layer in layers.items()}

    def claim(name: str) -> tuple:
        """Of the layer's next slot; the smallest is next."""
        n, (saved, at_vertex) = sizes[name], curves[name]
        within = not at_vertex[n - 1]  # of an edge, which is to be walked to its end
        return -saved[n - 1], not within, n / layers[name].num_experts, list(layers).index(name), name

    waiting = [claim(name) for name, layer in layers.items() if layer.num_experts > 1]
    heapq.heapify(waiting)
    while waiting:
        name = heapq.heappop(waiting)[-1]
        sizes[name] += 1
        if taken(sizes) > budget:
            sizes[name] -= 1  # a layer of smaller experts may still have one more
        elif sizes[name] < layers[name].num_experts:
            heapq.heappush(waiting, claim(name))
    return sizes


def _hull(layer: LayerCosts) -> tuple[np.ndarray, np.ndarray]:
    """The lower convex hull of a layer's misses: (H - 1,) misses that slot number 2 to H saves, not rising; (H,) bool,
    whether the curve touches it at n = 1 to H."""
    count = layer.num_experts
    if layer.misses is None:
        return np.zeros(count - 1), np.ones(count, bool)
    misses = layer.misses.astype(np.float64)
    vertices: list[int] = []
    for n in range(count):
        while len(vertices) > 1 and _is_above(misses, vertices[-2], vertices[-1], n):
            vertices.pop()
        vertices.append(n)
    saved = np.zeros(count - 1)
    for start, end in pairwise(vertices):
        saved[start:end] = max(0.0, (misses[start] - misses[end]) / (end - start))
    return saved, np.isin(np.arange(count), vertices)


def _is_above(values: np.ndarray, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies above the line between the others."""
    return (values[middle] - values[first]) * (last - first) > (values[last] - values[first]) * (middle - first)
