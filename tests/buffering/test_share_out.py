"""Bytes shared out over layers, beside the best share-out that trying all of them finds."""

from itertools import product

import numpy as np
import pytest

from fairseq_moe_ext.buffering.share_out import LayerCosts, share_out

STAGING = 2


def taken(layers):
    """Bytes of n slots of every layer, and of two more, as large as the largest, while they are needed."""

    def of(sizes):
        kept = sum(count * layers[name].expert_bytes for name, count in sizes.items())
        missing = sum(layer.num_experts - sizes[name] for name, layer in layers.items())
        return kept + min(STAGING, missing) * max(layer.expert_bytes for layer in layers.values())

    return of


def copied(layers, sizes) -> float:
    return sum(layer.misses[sizes[name] - 1] * layer.expert_bytes for name, layer in layers.items())


def best_of_all(layers, budget) -> float:
    """The fewest copied bytes of any share-out that fits."""
    every = product(*(range(1, layer.num_experts + 1) for layer in layers.values()))
    fitting = [sizes for counts in every if taken(layers)(sizes := dict(zip(layers, counts, strict=True))) <= budget]
    return min(copied(layers, sizes) for sizes in fitting)


def falling(numbers, count, is_convex) -> np.ndarray:
    """(count,) to 0 at the end."""
    steps = numbers.integers(0, 50, count - 1)
    steps = np.sort(steps) if is_convex else steps
    return np.append(steps.cumsum()[::-1], 0)


def made(seed, is_convex, sizes_of_experts):
    numbers = np.random.default_rng(seed)
    counts = numbers.integers(1, 7, 3)
    return {
        name: LayerCosts(int(count), int(numbers.choice(sizes_of_experts)), falling(numbers, count, is_convex))
        for name, count in zip("abc", counts, strict=True)
    }


@pytest.mark.parametrize("seed", range(20))
def test_of_convex_curves_it_is_the_best_of_all(seed):
    layers = made(seed, True, [7])
    least = taken(layers)(dict.fromkeys(layers, 1))
    for budget in range(least, least + 7 * 20):
        sizes = share_out(layers, budget, taken(layers))
        assert taken(layers)(sizes) <= budget
        assert copied(layers, sizes) == best_of_all(layers, budget)


@pytest.mark.parametrize("seed", range(20))
def test_of_any_curves_it_is_within_one_edge_of_the_best(seed):
    layers = made(seed, False, [3, 7])
    least = taken(layers)(dict.fromkeys(layers, 1))
    most = max(float(np.max(layer.misses) - np.min(layer.misses)) * layer.expert_bytes for layer in layers.values())
    for budget in range(least, least + 100, 3):
        sizes = share_out(layers, budget, taken(layers))
        assert taken(layers)(sizes) <= budget
        assert copied(layers, sizes) <= best_of_all(layers, budget) + most


def test_a_cliff_is_reached_where_the_bytes_suffice():
    """All misses go with the fourth slot of a; b saves a little with each."""
    layers = {"a": LayerCosts(4, 1, np.array([90, 90, 90, 0])), "b": LayerCosts(4, 1, np.array([30, 20, 10, 0]))}
    assert share_out(layers, 7, taken(layers)) == {"a": 4, "b": 1}
    assert share_out(layers, 9, taken(layers)) == {"a": 4, "b": 4}


def test_a_smaller_experts_slot_takes_what_a_larger_ones_leaves():
    layers = {"a": LayerCosts(4, 10, np.array([90, 60, 30, 0])), "b": LayerCosts(4, 3, np.array([3, 2, 1, 0]))}
    assert share_out(layers, 10 + 3 + 20 + 9, taken(layers)) == {"a": 1, "b": 4}


def test_without_curves_it_is_even():
    layers = {name: LayerCosts(count, 10) for name, count in (("a", 8), ("b", 8), ("c", 4))}
    assert share_out(layers, 20 + 100, taken(layers)) == {"a": 4, "b": 4, "c": 2}
    assert share_out(layers, 10_000, taken(layers)) == {"a": 8, "b": 8, "c": 4}


def test_equal_savings_are_shared_evenly():
    layers = {name: LayerCosts(8, 10, np.arange(70, -1, -10)) for name in "ab"}
    assert share_out(layers, 20 + 80, taken(layers)) == {"a": 4, "b": 4}


def test_too_few_bytes_are_refused_with_the_least_that_works():
    layers = {"a": LayerCosts(4, 10), "b": LayerCosts(1, 10)}
    with pytest.raises(ValueError, match=r"must be at least 40B \(0.0 MiB\) for one expert in each of 2 layers .* 39B"):
        share_out(layers, 39, taken(layers))
    assert share_out(layers, 40, taken(layers)) == {"a": 1, "b": 1}


def test_all_are_kept_where_they_need_no_slots_for_those_on_their_way():
    """Which a share-out that goes up one by one would not reach."""
    layers = {name: LayerCosts(16, 1) for name in "abcd"}

    def taken(sizes):
        return sum(sizes.values()) + min(12, sum(16 - size for size in sizes.values()))

    assert share_out(layers, 64, taken) == dict.fromkeys("abcd", 16)
    assert sum(share_out(layers, 63, taken).values()) == 51
