"""The largest batch and the most tokens/s within a limit, by hand."""

import pytest

from reproduction.passes import DYNAMIC, SPARSE, STATIC, Pass
from reproduction.throughput import best_of, ratio


def at(gating, batch, tokens, milliseconds, peak):
    return Pass("m", "LM", gating, batch, tokens, milliseconds, {}, peak, 0, 1.0)


PASSES = [
    at(STATIC, 1, 10, 10, 50),  # 1,000 tokens/s
    at(STATIC, 2, 20, 40, 100),
    at(SPARSE, 1, 10, 5, 30),
    at(SPARSE, 2, 20, 5, 60),  # 4,000
    at(SPARSE, 4, 40, 4, 120),  # faster, and past the limit
    at(DYNAMIC, 1, 10, 2, 20),
    at(DYNAMIC, 2, 20, 2.5, 40),  # 8,000
    at(DYNAMIC, 4, 40, 8, 80),
]


def test_the_best_within_the_limit():
    best = {each.gating: each for each in best_of(PASSES, limit=100)}
    assert (best[STATIC].largest_batch, best[STATIC].at_batch, best[STATIC].is_open) == (2, 1, False)
    assert (best[SPARSE].largest_batch, best[SPARSE].at_batch, best[SPARSE].is_open) == (2, 2, False)
    assert (best[DYNAMIC].largest_batch, best[DYNAMIC].at_batch, best[DYNAMIC].is_open) == (4, 2, True)
    assert ratio(list(best.values()), ("m", "LM"), STATIC) == pytest.approx(8)
    assert ratio(list(best.values()), ("m", "LM"), SPARSE) == pytest.approx(2)


def test_nothing_within_the_limit():
    assert [each.gating for each in best_of(PASSES, limit=20)] == [DYNAMIC]
