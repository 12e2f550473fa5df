"""A checkpoint's own task is the judge of the options that say what its tokens and inputs are."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fairseq.data import Dictionary
from omegaconf import DictConfig, OmegaConf

from fairseq_moe_ext.checkpoints.dictionary_checksum import DICTIONARY_CHECKSUM, dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.loading import EMBEDDINGS
from fairseq_moe_ext.checkpoints.plain_config import shown
from fairseq_moe_ext.option_names import as_option

logger = logging.getLogger("fairseq_moe_ext")

SERVED = "moe_served_checkpoint"  # the key of a state's `task_state` under which the loader hands this to the task

# field -> what another value would change. Options of data, batches and padding are the user's own
_COMPARED = {
    "langs": "the language tokens' rows of the embeddings",
    "encoder_langtok": "the source's language token",
    "decoder_langtok": "the target's language token",
    "langtoks": "the language tokens",
    "lang_tok_style": "the language tokens",
    "lang_tok_replacing_bos_eos": "where the language tokens stand",
    "add_data_source_prefix_tags": "the dictionary",
    "add_ssl_task_tokens": "the dictionary",
    "finetune_dict_specs": "the dictionary",
    "source_lang": "the dictionaries",
    "target_lang": "the dictionaries",
    "add_bos_token": "the first token",
    "output_dictionary_size": "the output dictionary",
    "self_target": "the targets",
    "future_target": "the targets",
    "past_target": "the targets",
}
_SWITCHES = ("add_bos_token",)  # which evaluation may leave off
_OF_THE_DICTIONARY = {"langs", "lang_tok_style"} | {name for name, sets in _COMPARED.items() if "the dictionar" in sets}
_BESIDE = ("lang_pairs", "lang_dict")  # which say the languages where `langs` does not
# of its data, which another command may read otherwise
DATA_FIELDS = (
    *("sample_break_mode", "tokens_per_sample", "shorten_method", "pad_to_fixed_length", "left_pad_source"),
    *("left_pad_target", "truncate_source", "max_source_positions", "max_target_positions"),
)
_OF_ONE_PAIR = ("source_lang", "target_lang")  # which a multilingual model serves many of


@dataclass(frozen=True)
class CheckpointTask:
    """path: the checkpoint. fields: its task's, by name. checksum: of its dictionary, where it has one. rows: of its
    embeddings.
    """

    path: str
    fields: dict[str, Any]
    checksum: str | None = None
    rows: frozenset[int] = frozenset()

    @classmethod
    def of_state(cls, path: str, state: dict[str, Any], fields: dict[str, Any]) -> CheckpointTask:
        """Of a checkpoint as `read_checkpoint` gives it; fields: its task's, as plain data."""
        extra = state.get("extra_state")
        checksum = extra.get(DICTIONARY_CHECKSUM) if isinstance(extra, dict) else None
        fields = {name: fields[name] for name in (*_COMPARED, *_BESIDE, *DATA_FIELDS) if name in fields}
        for name, value in fields.items():
            if not _is_option(value):
                raise CheckpointError(
                    f"{path}: its task's {name} must be a word, a number, a list or a mapping of words, got "
                    f"{shown(value)}"
                )
        rows = frozenset(state["model"][key].size(0) for key in EMBEDDINGS if key in state["model"])
        return cls(path, fields, checksum, rows)

    @property
    def languages(self) -> list[str]:
        """A multilingual task's, in the order of their tokens; none where the checkpoint does not say them."""
        return languages_of(self.fields) or []

    def check(self, task: Any, dictionaries: Sequence[Dictionary], languages: list[str] | None = None) -> None:
        """CheckpointError where the task's fields or dictionaries are not those that the checkpoint has.

        languages: the task's, wherever it has them from. A dictionary of another size is not judged here: loading does,
        with advice.
        """
        if self.rows and not {len(dictionary) for dictionary in dictionaries} <= self.rows:
            skipped, checksum = _OF_THE_DICTIONARY, None
        else:
            skipped, checksum = (), self.checksum
        ours = _fields(task)
        if languages is not None:
            ours["langs"] = languages
        for name, sets in _COMPARED.items():
            wanted, given = _value(self.fields, name), _value(ours, name)
            if name in skipped or name not in ours or wanted is None or wanted == given:
                continue
            if name in _OF_ONE_PAIR and is_multilingual(self.fields):
                continue
            flag = as_option(name)
            if name in _SWITCHES and given is False:  # as fairseq does without the flag
                logger.warning("%s was on in the training of %s and is off here: it sets %s", flag, self.path, sets)
                continue
            raise CheckpointError(
                f"{flag} must be as in {self.path}, {_shown(wanted)}, got {_shown(given)}: it sets {sets}"
            )
        for dictionary in dictionaries if checksum is not None else ():
            if dictionary_checksum(dictionary.symbols) != checksum:
                raise CheckpointError(
                    f"{self.path}: the dictionary must hold the words of the checkpoint's in the same order, and these "
                    f"{len(dictionary)} differ: dict.*.txt and the language flags must be those of the conversion"
                )


def _is_option(value: Any, depth: int = 2) -> bool:
    """Whether a value is one that an option of fairseq's tasks can have."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(name, str) and _is_option(item, depth - 1) for name, item in value.items())
    if isinstance(value, list | tuple):
        return depth > 0 and all(isinstance(item, str | Enum | None) for item in value)
    return isinstance(value, str | bool | int | float | Enum | None)


def _fields(task: Any) -> dict[str, Any]:
    """By name, interpolations left out; none of what is no task's configuration."""
    if isinstance(task, Namespace):
        fields = vars(task)
    elif isinstance(task, DictConfig):
        fields = OmegaConf.to_container(task, resolve=False)
    else:
        fields = task if isinstance(task, dict) else {}
    return {name: value for name, value in fields.items() if not (isinstance(value, str) and value.startswith("${"))}


def is_multilingual(fields: dict[str, Any]) -> bool:
    """Whether a task of these fields has several languages."""
    return any(fields.get(name) for name in ("langs", "lang_pairs", "lang_dict"))


def _value(fields: dict[str, Any], name: str) -> Any:
    """As it can be compared; None: it says nothing, or lies in a file."""
    value = fields.get(name)
    if name == "langs":
        return languages_of(fields)
    if name == "langtoks":
        return {key: list(value[key]) for key in sorted(value)} if isinstance(value, dict) else None
    if name == "encoder_langtok" and name in fields:
        return value or ""
    if name == "finetune_dict_specs":
        return sorted(value) if value else None
    if value in ("True", "False"):
        return value == "True"
    return value


def languages_of(fields: dict[str, Any]) -> list[str] | None:
    """In the order that gives their tokens their numbers: the list, or else the pairs' sorted, as fairseq does."""
    langs, pairs = fields.get("langs"), fields.get("lang_pairs")
    if langs:
        return langs.split(",") if isinstance(langs, str) else list(langs)
    if fields.get("lang_dict") or not pairs:
        return None
    pairs = pairs.split(",") if isinstance(pairs, str) else pairs
    return sorted({language for pair in pairs for language in str(pair).split("-")})


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))[:5000]
    return "none" if value in (None, "") else str(value)[:200]
