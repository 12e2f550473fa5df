"""Which experts are kept: by a fixed number, by one threshold for all layers, and with the guard of sentences' ends."""

import math

import numpy as np
import pytest

from fairseq_moe_ext.buffering.profile import LayerProfile, Profile
from fairseq_moe_ext.buffering.pruning import (
    METRICS,
    fixed_counts,
    guarded_experts,
    keep_by_threshold,
    keep_fixed,
    scores_of,
)

LAYERS = ("encoder.layers.3.moe_layer", "encoder.layers.7.moe_layer", "decoder.layers.3.moe_layer")


def random_scores(seed, experts=12):
    generator = np.random.default_rng(seed)
    return {name: generator.gamma(0.3, size=experts).round(3) for name in LAYERS}


def best(scores, count, guarded=()):
    """One expert after another, from the best on; of equals the lower number."""
    kept = []
    while len(kept) < count:
        left = [expert for expert in range(len(scores)) if expert not in kept]
        kept.append(max(left, key=lambda expert: (scores[expert], -expert)))
    return tuple(sorted({*kept, *guarded}))


def by_threshold(scores, most, guarded):
    """The sets of the largest share that any layer can reach with its best experts and that fits."""
    shares = sorted({sum(sorted(each)[-n:]) / sum(each) for each in scores.values() for n in range(1, len(each) + 1)})
    found = None
    for share in shares:
        kept = {}
        for name, each in scores.items():
            count = next(n for n in range(1, len(each) + 1) if sum(sorted(each)[-n:]) / sum(each) >= share - 1e-12)
            kept[name] = best(each, max(4, count))
        if found is None or sum(map(len, kept.values())) <= most:
            found = kept
    return {name: tuple(sorted({*numbers, *guarded.get(name, ())})) for name, numbers in found.items()}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("guarded", [{}, {LAYERS[2]: (0, 7)}, {LAYERS[2]: (0, 1, 2, 3, 4, 5, 6, 7)}])
def test_the_best_experts_are_kept(seed, guarded):
    scores = random_scores(seed)
    counts = dict(zip(LAYERS, (7, 7, 4), strict=True))
    wanted = {name: best(scores[name], counts[name], guarded.get(name, ())) for name in LAYERS}
    assert keep_fixed(scores, counts, guarded) == wanted
    for most in (12, 17, 25, 36):
        assert keep_by_threshold(scores, most, guarded) == by_threshold(scores, most, guarded)


def test_a_threshold_fits_and_keeps_more_where_it_is_needed():
    even = np.ones(128)
    peaked = np.array([100.0] * 5 + [0.01] * 123)
    kept = keep_by_threshold({LAYERS[0]: even, LAYERS[2]: peaked}, 100)
    assert len(kept[LAYERS[0]]) + len(kept[LAYERS[2]]) <= 100
    assert len(kept[LAYERS[0]]) > 90 and 4 <= len(kept[LAYERS[2]]) <= 5


@pytest.mark.parametrize("share, encoder, decoder", [(0.1875, 36, 12), (0.5, 96, 32), (0.75, 128, 64), (1.0, 128, 128)])
def test_an_encoder_keeps_three_for_one_of_a_decoder(share, encoder, decoder):
    layers = {f"{side}.layers.{number}": 128 for side in ("encoder", "decoder") for number in range(6)}
    found = fixed_counts(layers, share)
    assert set(found.values()) == {encoder, decoder}
    assert all(count == (encoder if name.startswith("encoder") else decoder) for name, count in found.items())


def test_counts_of_one_side_and_of_few_experts():
    assert fixed_counts({"decoder.layers.1": 128}, 0.2) == {"decoder.layers.1": 25}
    assert fixed_counts({"encoder.layers.1": 8, "decoder.layers.1": 2}, 0.01) == {
        "encoder.layers.1": 4,
        "decoder.layers.1": 2,
    }
    even = fixed_counts({"encoder.layers.1": 128, "decoder.layers.1": 128}, 0.25, ratio=1)
    assert even == {"encoder.layers.1": 32, "decoder.layers.1": 32}


def test_the_guard_has_nearly_all_ends():
    assert guarded_experts(np.array([0, 5, 0, 95])) == (1, 3)
    assert guarded_experts(np.array([1, 0, 0, 99])) == (3,)
    assert guarded_experts(np.zeros(4, np.int64)) == ()


def test_metrics_are_those_of_the_language():
    first, confidence = np.array([[8, 2, 0], [1, 1, 2]]), np.array([[0.9, 0.5, 0], [0.2, 0.4, 0.6]])
    activity = first / first.sum(axis=1, keepdims=True)
    layer = LayerProfile(
        tokens=first.sum(axis=1),
        importance=activity * np.exp(confidence),
        ends=np.zeros((2, 3), np.int64),
        first=first,
        load=np.array([9, 9, 5]),
    )
    profile = Profile(("en", "de"), dict.fromkeys(LAYERS, layer))
    found = {metric: scores_of(profile, "de", LAYERS[:2], metric, seed=3) for metric in METRICS}
    assert found["activity"][LAYERS[0]].tolist() == [0.25, 0.25, 0.5]
    assert found["importance"][LAYERS[0]][2] == pytest.approx(0.5 * math.exp(0.6))
    assert found["load"][LAYERS[0]].tolist() == [9, 9, 5]
    drawn = found["random"]
    assert not np.array_equal(drawn[LAYERS[0]], drawn[LAYERS[1]])
    again = scores_of(profile, "de", LAYERS[1:2], "random", seed=3)
    assert np.array_equal(drawn[LAYERS[1]], again[LAYERS[1]])
    assert not np.array_equal(drawn[LAYERS[1]], scores_of(profile, "en", LAYERS[1:2], "random", seed=3)[LAYERS[1]])
