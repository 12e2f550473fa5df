"""The fields of a served model's configuration, each with the values that it may have.

A field's type is the one that fairseq's and the plugin's dataclasses give it. What fairseq would evaluate, a list of
numbers in a string, is parsed as a literal here and handed on as the list; what it would open as a file must be unset.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from fairseq import utils
from fairseq.dataclass.utils import interpret_dc_type
from fairseq.models.transformer.transformer_config import (
    DecoderConfig,
    EncDecBaseConfig,
    QuantNoiseConfig,
    TransformerConfig,
)
from fairseq.models.transformer_lm import TransformerLanguageModelConfig

from fairseq_moe_ext.checkpoints.moe_config import MoEModelFields
from fairseq_moe_ext.checkpoints.plain_config import ConfigError, shown
from fairseq_moe_ext.checkpoints.supported_fields import is_checked

LONGEST, MOST_ITEMS = 1000, 100  # of a literal: characters, numbers in its list
MOST_POSITIONS = 1_000_000
_GROUPS = ("encoder", "decoder", "quant_noise")  # of fairseq's TransformerConfig; elsewhere prefixes of its fields
_CLASSES = (
    *((prefix, EncDecBaseConfig) for prefix in ("encoder_", "decoder_", "")),
    *((prefix, DecoderConfig) for prefix in ("decoder_", "")),
    *((prefix, QuantNoiseConfig) for prefix in ("quant_noise_", "")),
    *(("", cls) for cls in (TransformerConfig, TransformerLanguageModelConfig, MoEModelFields)),
)


class _Wrong(Exception):
    """Says what a value must be."""


def parse_model_fields(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Of a configuration's model what fairseq's transformers and the plugin read, each value of its field's type.

    given: plain data. An interpolation that fairseq itself gives a field by default counts as unset; ConfigError names
    the field, the rule and the value at any other, and at a value that the field cannot have.
    """
    flat = {name: value for name, value in given.items() if name not in _GROUPS}
    for group in _GROUPS:
        nested = given.get(group)
        if isinstance(nested, Mapping):
            flat |= {f"{group}_{name}": value for name, value in nested.items()}
    return _parse(flat, _MODEL_PARSERS, _MODEL_DEFAULTS, is_checked)


def parse_fields(given: Mapping[Any, Any], dataclass: type) -> dict[str, Any]:
    """Of `given` the fields of one of fairseq's dataclasses, as in `parse_model_fields`."""
    parsers, defaults = _parsers((("", dataclass),))
    return _parse(given, parsers, defaults, lambda name: False)


def _parse(
    given: Mapping[Any, Any], parsers: Mapping[str, Callable], defaults: Mapping[str, set], kept: Callable[[str], bool]
) -> dict[str, Any]:
    parsed = {}
    for name, value in given.items():
        if not isinstance(name, str) or name not in parsers and not kept(name):
            continue
        if value == "???" or isinstance(value, str) and value in defaults.get(name, ()):
            continue
        try:
            parsed[name] = value if value is None or name not in parsers else parsers[name](value)
        except _Wrong as error:
            raise ConfigError(f"checkpoint field {name[:80]} must be {error}, got {shown(value)}") from None
    return parsed


def _literal(value: Any) -> Any:
    """What a string says as a Python literal; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value) if len(value) <= LONGEST else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _whole(value: Any) -> int:
    number = _literal(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or number is True or abs(number) >= 1 << 31:
        raise _Wrong("a whole number below 2^31")
    return int(number)  # old files have False for 0


def _between(least: int, most: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = _whole(value)
        if not least <= number <= most:
            raise _Wrong(f"from {least} to {most:,}")
        return number

    return parse


def _number(value: Any) -> float:
    number = _literal(value)
    if not isinstance(number, int | float) or number is True:
        raise _Wrong("a number")
    return number


def _share(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise _Wrong("a number from 0 to 1")
    return number


def _flag(value: Any) -> bool:
    number = _literal(value)
    if number is None or not isinstance(number, int | float) or number not in (0, 1):
        raise _Wrong("True or False")
    return bool(number)


def _word(value: Any) -> str:
    text = value.value if isinstance(value, Enum) else value
    if not isinstance(text, str) or not re.fullmatch(r"[\w.-]{0,100}", text):
        raise _Wrong("a word")
    return text


def _activation(value: Any) -> str:
    known = utils.get_available_activation_fns()
    if _word(value) not in known:
        raise _Wrong(f"one of {', '.join(known)}")
    return _word(value)


def _numbers(value: Any) -> list[int]:
    items = _literal(value)
    items = [items] if isinstance(items, int) else items
    if not isinstance(items, list | tuple) or len(items) > MOST_ITEMS:
        raise _Wrong(f"a list of at most {MOST_ITEMS} whole numbers")
    return [_whole(item) for item in items]


def _layers_to_keep(value: Any) -> str:
    """As fairseq splits it."""
    return ",".join(map(str, _numbers(f"{value}," if isinstance(value, str) else value)))


def _filters(value: Any) -> str:
    """A literal again, since fairseq evaluates it: of two numbers for each filter."""
    items = _literal(value)
    if not isinstance(items, list | tuple) or len(items) > MOST_ITEMS:
        raise _Wrong(f"a list of at most {MOST_ITEMS} pairs of whole numbers")
    pairs = [tuple(_numbers(item)) for item in items]
    if any(len(pair) != 2 for pair in pairs):
        raise _Wrong("pairs of whole numbers")
    return repr(pairs)


def _unset(value: Any) -> None:
    """What is left out can be overridden by the user."""
    if value != "":
        raise _Wrong("unset, since fairseq would read a file or run what it names (None in --model-overrides)")


_BY_NAME: dict[str, Callable] = {
    "activation_fn": _activation,
    "character_filters": _filters,
    **dict.fromkeys(("adaptive_softmax_cutoff", "adaptive_input_cutoff"), _numbers),
    **{f"{side}layers_to_keep": _layers_to_keep for side in ("encoder_", "decoder_", "")},
    **{f"{side}xformers_att_config": _unset for side in ("encoder_", "decoder_", "")},
    **{f"{side}embed_path": _unset for side in ("encoder_", "decoder_", "")},
    **dict.fromkeys(("max_source_positions", "max_target_positions", "tokens_per_sample"), _between(1, MOST_POSITIONS)),
    # a side that a model does not have may have 0
    **{f"{side}attention_heads": _between(0, 100_000) for side in ("encoder_", "decoder_", "")},
    **{f"{side}layers": _between(0, MOST_POSITIONS) for side in ("encoder_", "decoder_", "")},
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "relu_dropout", "cmr_gate_drop"), _share),
    **dict.fromkeys(("adaptive_softmax_dropout", "moe_eom", "moe_fom"), _share),
    **{f"{side}layerdrop": _share for side in ("encoder_", "decoder_", "")},
}
# of older releases and models, which fairseq's architectures still read
_OLD: dict[str, Callable] = {
    **dict.fromkeys(("no_tie_adaptive_proj", "decoder_final_norm"), _flag),
    **dict.fromkeys(("arch", "_name"), _word),
    # of fairseq's transformer_align, which has no dataclass
    **dict.fromkeys(("alignment_heads", "alignment_layer"), _between(0, MOST_POSITIONS)),
    "full_context_alignment": _flag,
}
_BY_TYPE: dict[Any, Callable] = {int: _whole, float: _number, bool: _flag}


def _parsers(classes) -> tuple[dict[str, Callable], dict[str, set[str]]]:
    """By a field's name: what parses it, and the interpolations that it has by default."""
    parsers, defaults = {**_OLD, **_BY_NAME}, {}
    for prefix, dataclass in classes:
        for item in fields(dataclass):
            name = f"{prefix}{item.name}"
            if name not in _GROUPS:
                parsers.setdefault(name, _BY_TYPE.get(interpret_dc_type(item.type), _word))
            if isinstance(item.default, str) and item.default.startswith("${"):
                defaults.setdefault(name, set()).add(item.default)
    return parsers, defaults


_MODEL_PARSERS, _MODEL_DEFAULTS = _parsers(_CLASSES)
