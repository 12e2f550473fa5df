"""The tokens that NLLB's dictionary has beyond dict.txt and the language tokens, in NLLB's order.

Source: `fairseq/data/multilingual/multilingual_utils.py` of upstream's branch `nllb`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product

MASK = "<mask>"
DATA_SOURCE_TAGS = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")
DENOISING, DENOISING_TASK = "mono_dae", "__dae__"
LANGUAGE_MODEL, LANGUAGE_MODEL_TASK = "mono_lm", "__lm__"
MIXED = "mono_mixed_task"  # both
ALL_EXTRA_TOKENS = (MASK, DENOISING_TASK, *DATA_SOURCE_TAGS, LANGUAGE_MODEL_TASK)

TAGS_OPTION = "--add-data-source-prefix-tags"
TASKS_OPTION = "--add-ssl-task-tokens"
SPECS_OPTION = "--finetune-dict-specs"


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


def mending(wanted: int, given: int, given_tokens: Collection[str]) -> str:
    """Which options make `given` entries `wanted`, where the given options added `given_tokens`; "" if none do."""
    extra = wanted - given + len(given_tokens)
    fitting = next((options for options, tokens in option_sets() if len(tokens) == extra), None)
    if fitting is None:
        return ""
    return f"give {fitting}" if fitting else f"leave out {TAGS_OPTION}, {TASKS_OPTION} and {SPECS_OPTION}"
