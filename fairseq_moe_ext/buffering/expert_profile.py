"""What `--expert-profile` says of a model's layers: a trace, a profile or published sets, for a run's languages.

Legend: E = experts of a layer, H = local experts, n = experts that its buffer keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fairseq_moe_ext.bounded_json import parse_json, read_regular
from fairseq_moe_ext.buffering.profile import Profile, listed, parse_profile
from fairseq_moe_ext.buffering.published_sets import check_published_sets, parse_published_sets
from fairseq_moe_ext.buffering.simulation import LayerLoads, layers_of, simulate
from fairseq_moe_ext.npz_reading import reason_of
from fairseq_moe_ext.trace import load_trace

KINDS = "a trace (--moe-trace), a profile (fairseq-moe profile) or sets of experts by language (.json)"
# turns that the curve of one layer is made of, over all n: some seconds
MOST_TURNS = 500_000


@dataclass(frozen=True)
class Languages:
    """Of a run: its sources, which an encoder's layers go by, and its targets. A language model has "" as its one
    target; none where they are not known."""

    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("",)

    def of_layer(self, name: str) -> tuple[str, ...]:
        """Sources or targets."""
        return self.sources if name.startswith("encoder.") else self.targets


@dataclass(frozen=True)
class LayerImportance:
    """weights (E,): of each expert, by which the first are resident; tokens: what the layer had of them, in all.

    loads: of a trace, its calls.
    """

    weights: np.ndarray
    tokens: float
    loads: LayerLoads | None = None

    def ranking(self) -> list[int]:
        """All E, the most important first; equals by number."""
        return np.argsort(-self.weights.astype(np.float64), kind="stable").tolist()

    def of_experts(self, numbers: Sequence[int]) -> LayerImportance:
        """Of a layer that has been left these experts, which are numbered anew."""
        numbers = list(numbers)
        loads = None if self.loads is None else replace(self.loads, loads=self.loads.loads[:, numbers])
        share = self.weights[numbers].sum() / max(self.weights.sum(), 1e-300)
        return LayerImportance(self.weights[numbers], self.tokens * share, loads)

    def misses(self, local: Sequence[int], order: str, policy: str) -> np.ndarray:
        """(H,) float64: of a buffer of 1 to H of the experts `local`. Of a trace those of its calls, exactly, as far as
        MOST_TURNS go, and the rest in proportion; else one for each token whose expert is none of the n most important.
        """
        if self.loads is None:
            weights = np.sort(self.weights[list(local)].astype(np.float64))[::-1]
            outside = np.append(weights[::-1].cumsum()[-2::-1], 0.0)  # of the n first
            return self.tokens * outside / max(self.weights.sum(), 1e-300)
        ours = replace(self.loads, loads=self.loads.loads[:, list(local)])
        turns = np.count_nonzero(ours.loads, axis=1).cumsum()
        most = MOST_TURNS // len(local)
        calls = max(1, int(np.searchsorted(turns, most, side="right")))
        ranking = LayerImportance(self.weights[list(local)], self.tokens).ranking()
        first = replace(ours, loads=ours.loads[:calls])
        found = [simulate(first, n, order, policy, ranking).misses for n in range(1, len(local) + 1)]
        return np.array(found, np.float64) * (turns[-1] / max(1, turns[calls - 1]))


def check_expert_profile(path: Path) -> None:
    """ValueError where the file is none of KINDS."""
    if not goes_by_languages(path):
        load_trace(path)
        return
    try:
        content = parse_json(read_regular(path))
        parse_profile(content) if _is_profile(content) else check_published_sets(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error


def importance_of_layers(
    path: Path, num_experts: Mapping[str, int], layers: Sequence[str], languages: Languages
) -> dict[str, LayerImportance]:
    """What the file says of `layers`. num_experts: name -> E, of all the model's. Several languages are summed.

    ValueError where it is of another model, or has not the languages.
    """
    wanted = {name: num_experts[name] for name in layers}
    if not goes_by_languages(path):
        return _of_trace(path, wanted)
    content = parse_json(read_regular(path))
    try:
        if _is_profile(content):
            return _of_profile(parse_profile(content), wanted, languages)
        sets = parse_published_sets(content, num_experts)
        return {
            name: _of_sets({language: kept[name] for language, kept in sets.items()}, count, languages.of_layer(name))
            for name, count in wanted.items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def goes_by_languages(path: Path) -> bool:
    """Whether it is no trace, which is of the languages that it was recorded with."""
    try:
        return read_regular(path).lstrip()[:1] in (b"{", b"[")
    except OSError:
        return False


def _is_profile(content: object) -> bool:
    return isinstance(content, dict) and "layers" in content


def _of_trace(path: Path, num_experts: Mapping[str, int]) -> dict[str, LayerImportance]:
    profiled = {layer.name: layer for layer in layers_of(load_trace(path))}
    for name, count in num_experts.items():
        found = profiled[name].num_experts if name in profiled else None
        if found != count:
            raise ValueError(f"{path}: must hold {count} experts' loads of {name}, found {found or 'no such layer'}")
    totals = {name: profiled[name].loads.sum(axis=0, dtype=np.int64) for name in num_experts}
    return {name: LayerImportance(total, float(total.sum()), profiled[name]) for name, total in totals.items()}


def _of_profile(
    profile: Profile, num_experts: Mapping[str, int], languages: Languages
) -> dict[str, LayerImportance]:
    found = {}
    for name, count in num_experts.items():
        has = profile.layers[name].num_experts if name in profile.layers else None
        if has != count:
            raise ValueError(f"must hold the importance of {count} experts of {name}, found {has or 'no such layer'}")
        named = _named(name, languages.of_layer(name), profile.languages_of(name))
        places = [profile.languages.index(each) for each in named]
        tokens = float(profile.layers[name].tokens[places].sum())
        found[name] = LayerImportance(profile.of_languages(name, named), tokens)
    return found


def _of_sets(kept: Mapping[str, Sequence[int]], count: int, languages: Sequence[str]) -> LayerImportance:
    """A language's experts of one layer share one token evenly: the file does not say how many a layer has."""
    weights = np.zeros(count)
    named = _named("this model", languages, tuple(kept))
    for language in named:
        weights[list(kept[language])] += 1 / max(1, len(kept[language]))
    return LayerImportance(weights, float(len(named)))


def _named(what: str, languages: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """`languages`, all of them known; ValueError."""
    if not languages:
        raise ValueError("the run must name its languages, by --source-lang and --target-lang or by --lang-pairs")
    for language in languages:
        if language not in known:
            raise ValueError(f"it knows the languages {listed(known)} for {what}, not {language!r}")
    return languages
