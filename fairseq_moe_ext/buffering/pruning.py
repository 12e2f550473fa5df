"""Which experts of every layer a language keeps, chosen by how much it uses them.

Source: "Memory-efficient NLLB-200" (arXiv 2212.09811), its section 3: a fixed number per layer, three of an encoder's
for one of a decoder's, or by one threshold for all layers. The guard of the end of sentence is this project's own.

Legend: E = experts of a layer, G = languages.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fairseq_moe_ext.buffering.profile import Profile

METRICS = ("importance", "activity", "load", "random")
LEAST = 4  # experts of a layer
RATIO = 3.0  # of an encoder layer's to a decoder layer's
GUARDED = 0.99  # of the ends of sentences

Scores = Mapping[str, np.ndarray]  # layer -> (E,) float64, of one language or pair


def scores_of(
    profile: Profile, language: str, layers: Sequence[str], metric: str, seed: int = 0
) -> dict[str, np.ndarray]:
    """What `layers`, of which the profile had tokens of the language, say by one of METRICS.

    activity: the share of first choices; importance: with the gate's confidence; load: of all choices, whatever their
    language; random: by `seed`, and no matter which layers are asked for.
    """
    place = profile.languages.index(language)
    found = {}
    for name in layers:
        layer = profile.layers[name]
        if metric == "random":
            draw = np.random.default_rng([seed, zlib.crc32(language.encode()), zlib.crc32(name.encode())])
            found[name] = draw.random(layer.num_experts)
        elif metric == "load":
            found[name] = layer.load.astype(np.float64)
        else:
            found[name] = (layer.importance if metric == "importance" else layer.activity)[place]
    return found


def guarded_experts(ends: np.ndarray, share: float = GUARDED) -> tuple[int, ...]:
    """ends (E,) first choices where a decoder emits the end of sentence -> the fewest experts with `share` of them.

    >>> guarded_experts(np.array([1, 0, 600, 399]))
    (2, 3)
    """
    if not ends.sum():
        return ()
    order = np.argsort(-ends, kind="stable")
    reached = np.cumsum(ends[order]) >= share * ends.sum()
    return tuple(sorted(order[: int(np.argmax(reached)) + 1].tolist()))


def fixed_counts(num_experts: Mapping[str, int], share: float, ratio: float = RATIO) -> dict[str, int]:
    """How many experts every layer keeps of so many, so that about `share` of all are kept.

    ratio: of an encoder layer's to a decoder layer's, as far as an encoder has them; a model of one side keeps `share`
    of each layer.

    >>> fixed_counts({"encoder.layers.3": 128, "decoder.layers.3": 128}, 0.1875)
    {'encoder.layers.3': 36, 'decoder.layers.3': 12}
    """
    encoders = sum(count for name, count in num_experts.items() if _is_encoder(name))
    decoders = sum(num_experts.values()) - encoders
    wanted = share * (encoders + decoders)
    of_encoder = of_decoder = share
    if encoders and decoders:
        of_encoder = min(1.0, ratio * wanted / (ratio * encoders + decoders))
        of_decoder = min(1.0, (wanted - of_encoder * encoders) / decoders)
        of_encoder = min(1.0, (wanted - of_decoder * decoders) / encoders)
    return {
        name: min(count, max(LEAST, int((of_encoder if _is_encoder(name) else of_decoder) * count + 1e-9)))
        for name, count in num_experts.items()
    }


def keep_fixed(
    scores: Scores, counts: Mapping[str, int], guarded: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """The best of every layer, so many, of equals the lower numbers; rising.

    guarded: what a layer keeps beside them. In their place it would cost: where sentences end, few other tokens go.
    """
    return {name: _best(each, counts[name], (guarded or {}).get(name, ())) for name, each in scores.items()}


def keep_by_threshold(
    scores: Scores, most: int, guarded: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """At most `most` experts of all layers together: of every layer the fewest that reach one share of its scores' sum,
    the same share in all layers and as large as fits; at least LEAST of each. guarded: as of `keep_fixed`, beside these
    `most`."""
    masses = {name: np.cumsum(np.sort(each)[::-1]) / max(each.sum(), 1e-300) for name, each in scores.items()}
    thresholds = np.unique(np.concatenate(list(masses.values())))

    def counts(threshold: float) -> dict[str, int]:
        reached = {name: int(np.searchsorted(mass, threshold - 1e-12)) + 1 for name, mass in masses.items()}
        return {name: min(max(LEAST, reached[name]), len(mass)) for name, mass in masses.items()}

    last = _last_that(lambda number: sum(counts(thresholds[number]).values()) <= most, len(thresholds))
    return keep_fixed(scores, counts(float(thresholds[last])), guarded)


def _last_that(fits: Callable[[int], bool], count: int) -> int:
    """The last of 0 .. count - 1 that fits, where all before it do; 0 where none does."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _best(scores: np.ndarray, count: int, guarded: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({*guarded, *np.argsort(-scores, kind="stable")[:count].tolist()}))


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.")
