"""The tokens that NLLB's dictionary has beyond dict.txt and the language tokens, in NLLB's order.

Source: `fairseq/data/multilingual/multilingual_utils.py` of upstream's branch `nllb`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import Any

MASK = "<mask>"
DATA_SOURCE_TAGS = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")
DENOISING, DENOISING_TASK = "mono_dae", "__dae__"
LANGUAGE_MODEL, LANGUAGE_MODEL_TASK = "mono_lm", "__lm__"
MIXED = "mono_mixed_task"  # both
ALL_EXTRA_TOKENS = (MASK, DENOISING_TASK, *DATA_SOURCE_TAGS, LANGUAGE_MODEL_TASK)

TAGS_OPTION, TAGS_FIELD = "--add-data-source-prefix-tags", "add_data_source_prefix_tags"
TASKS_OPTION = "--add-ssl-task-tokens"
SPECS_OPTION = "--finetune-dict-specs"
_LANGUAGE_TOKEN = re.compile(r"__.+__|\[.+\]")


def extra_tokens(
    source_tags: bool = False,
    task_tokens: bool = False,
    specs: Collection[str] = (),
    extra_data: Collection[str] = (),
    mbart_style: bool = False,
) -> list[str]:
    """What follows the language tokens.

    source_tags, task_tokens: --add-data-source-prefix-tags, --add-ssl-task-tokens. specs, extra_data: the keys of
    --finetune-dict-specs and --extra-data. mbart_style: language tokens as `[xx]`.

    >>> extra_tokens(source_tags=True)
    ['<MINED_DATA>', '<MMT_BT_DATA>', '<SMT_BT_DATA>']
    >>> extra_tokens(True, True, ["mono_dae", "mono_lm"])
    ['<mask>', '__dae__', '<MINED_DATA>', '<MMT_BT_DATA>', '<SMT_BT_DATA>', '__lm__']
    """
    mixed = MIXED in extra_data
    tokens = []
    if mbart_style or mixed or DENOISING in extra_data or DENOISING in specs:
        tokens += [MASK, DENOISING_TASK] if task_tokens else [MASK]
    if source_tags:
        tokens += DATA_SOURCE_TAGS
    if task_tokens and (mixed or LANGUAGE_MODEL in extra_data or LANGUAGE_MODEL in specs):
        tokens.append(LANGUAGE_MODEL_TASK)
    return tokens


def extra_tokens_of(args: Any) -> list[str]:
    """As a multilingual task's arguments ask for them (a Namespace, of a checkpoint too; what is missing is off)."""
    specs, extra_data = (getattr(args, name, None) for name in ("finetune_dict_specs", "extra_data"))
    return extra_tokens(
        getattr(args, TAGS_FIELD, False),
        getattr(args, "add_ssl_task_tokens", False),
        specs if isinstance(specs, Collection) else (),
        extra_data if isinstance(extra_data, Collection) else (),
        getattr(args, "lang_tok_style", None) == "mbart",
    )


def option_sets() -> Iterator[tuple[str, list[str]]]:
    """(the options as they are written, the tokens they add) of all that differ, those that say least first."""
    seen: set[tuple[str, ...]] = set()
    specs_choices = ((), (DENOISING,), (LANGUAGE_MODEL,), (DENOISING, LANGUAGE_MODEL))
    for specs, tasks, tags in product(specs_choices, (False, True), (True, False)):
        tokens = extra_tokens(tags, tasks, specs)
        if tuple(tokens) in seen:
            continue
        seen.add(tuple(tokens))
        options = [TAGS_OPTION] * tags + [TASKS_OPTION] * tasks
        if specs:
            options.append(f"{SPECS_OPTION} '{ {name: '' for name in specs} }'".replace("{ ", "{").replace(" }", "}"))
        yield " ".join(options), tokens


def mending(wanted: int, given: int, given_tokens: Collection[str], told: Sequence[str] | None = None) -> str:
    """Which options make `given` entries `wanted`, where the given options added `given_tokens`; "" if none do.

    told: the tokens that the checkpoint's own options added, in their order; None: it does not say, and the number
    alone decides.
    """
    extra = wanted - given + len(given_tokens)
    if told is not None and extra != len(told):
        return ""
    fitting = [
        options
        for options, tokens in option_sets()
        if (len(tokens) == extra if told is None else sorted(tokens) == sorted(told))
    ]
    if not fitting:
        return ""
    return f"give {fitting[0]}" if fitting[0] else f"leave out {TAGS_OPTION}, {TASKS_OPTION} and {SPECS_OPTION}"


def vocabulary_advice(told: Sequence[str] | None, wanted: int, given: int, symbols: Sequence[str]) -> str:
    """Which of NLLB's options make a multilingual dictionary of `symbols` fit, "" for any other; told: as `mending`."""
    if not any(_LANGUAGE_TOKEN.fullmatch(symbol) for symbol in symbols):
        return ""
    advice = mending(wanted, given, [symbol for symbol in symbols if symbol in ALL_EXTRA_TOKENS], told)
    if advice and told is None:
        return f"by the numbers alone, for the checkpoint does not say its options: {advice}"
    return advice
