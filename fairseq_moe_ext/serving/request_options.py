"""What a request to the engine may ask for itself, by the names of fairseq's generation flags."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq_moe_ext.serving.keyword_options import OptionError
from fairseq_moe_ext.serving.requests import NOT_OF_ONE_SENTENCE, SearchOptions


@dataclass(frozen=True)
class _Rule:
    says: str
    holds: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_SEARCH = {
    "beam": _Rule("a whole number from 1", lambda value: _whole(value) and value >= 1),
    "nbest": _Rule("a whole number from 1", lambda value: _whole(value) and value >= 1),
    "max_len_a": _Rule("a number from 0", lambda value: _number(value) and value >= 0),
    "max_len_b": _Rule("a whole number from 0", lambda value: _whole(value) and value >= 0),
    "min_len": _Rule("a whole number from 0", lambda value: _whole(value) and value >= 0),
    "lenpen": _Rule("a number", _number),
    "unkpen": _Rule("a number", _number),
    "temperature": _Rule("a number above 0", lambda value: _number(value) and value > 0),
    "unnormalized": _Rule("true or false", lambda value: isinstance(value, bool)),
}
_LANGUAGES = {
    "source_lang": _Rule("a language's name", lambda value: isinstance(value, str)),
    "target_lang": _Rule("a language's name", lambda value: isinstance(value, str)),
}


@dataclass(frozen=True)
class RequestOptions:
    """One request's; `source_lang` and `target_lang` are None where they are those that the model was loaded for."""

    beam: int
    nbest: int
    max_len_a: float
    max_len_b: int
    search: SearchOptions
    source_lang: str | None = None
    target_lang: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any], generation: Any) -> RequestOptions:
        """`given` over fairseq's `generation` options; OptionError for a name or a value that is none of a request's."""
        rules = {**_SEARCH, **_LANGUAGES}
        for name, value in given.items():
            if name in NOT_OF_ONE_SENTENCE:
                raise OptionError(f"{name} is no option of a request, whose search is beam search")
            if name not in rules:
                raise OptionError(f"a request's options must be of {', '.join(rules)}, got {name!r}")
            if not rules[name].holds(value):
                raise OptionError(f"{name} must be {rules[name].says}, got {value!r}")
        of = Namespace(**{name: given.get(name, getattr(generation, name)) for name in _SEARCH})
        if "nbest" in given and of.nbest > of.beam:
            raise OptionError(f"nbest must be at most the beam size, {of.beam}, got {of.nbest}")
        search = SearchOptions(of.min_len, not of.unnormalized, of.lenpen, of.unkpen, of.temperature)
        languages = given.get("source_lang"), given.get("target_lang")
        return cls(of.beam, min(of.nbest, of.beam), of.max_len_a, of.max_len_b, search, *languages)
