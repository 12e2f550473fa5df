"""What a request to the engine may ask for itself, by the names of fairseq's generation flags."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq_moe_ext.decoding.option_rules import VALUES, Rule, whole
from fairseq_moe_ext.decoding.requests import NOT_OF_ONE_SENTENCE, SearchOptions
from fairseq_moe_ext.serving.keyword_options import OptionError

# whole numbers have a bound, since a request comes from outside: far beyond what is of use
_SEARCH = {
    **{name: whole(1, 1_000_000) for name in ("beam", "nbest")},
    **{name: whole(0, 1_000_000) for name in ("max_len_b", "min_len")},
    **{name: VALUES[name] for name in ("max_len_a", "lenpen", "unkpen", "temperature")},
    "unnormalized": Rule("true or false", lambda value: isinstance(value, bool)),
}
_LANGUAGES = {
    "source_lang": Rule("a language's name", lambda value: isinstance(value, str)),
    "target_lang": Rule("a language's name", lambda value: isinstance(value, str)),
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
        """`given` over fairseq's `generation` options; OptionError for a name or a value that no request has."""
        rules = {**_SEARCH, **_LANGUAGES}
        for name, value in given.items():
            if name in NOT_OF_ONE_SENTENCE:
                raise OptionError(f"{name} is no option of a request, whose search is beam search")
            if name not in rules:
                raise OptionError(f"a request's options must be of {', '.join(rules)}, got {name!r:.40}")
            if not rules[name].holds(value):
                raise OptionError(f"{name} must be {rules[name].says}, got {value!r:.40}")
        of = Namespace(**{name: given.get(name, getattr(generation, name)) for name in _SEARCH})
        if "nbest" in given and of.nbest > of.beam:
            raise OptionError(f"nbest must be at most the beam size, {of.beam}, got {of.nbest}")
        search = SearchOptions(
            of.min_len, not of.unnormalized, float(of.lenpen), float(of.unkpen), float(of.temperature)
        )
        languages = given.get("source_lang"), given.get("target_lang")
        return cls(of.beam, min(of.nbest, of.beam), of.max_len_a, of.max_len_b, search, *languages)
