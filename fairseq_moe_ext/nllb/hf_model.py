"""What a folder in Hugging Face's layout says beside its weights, as fairseq needs it: configuration and vocabulary.

Both conversions begin with it, to one checkpoint (convert.py) and to a quantised one (hf_source.py).
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_ext.checkpoints.dictionary_checksum import DICTIONARY_CHECKSUM, dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.config import NllbConfig
from fairseq_moe_ext.nllb.fields import BOOKKEEPING, dropped_fields
from fairseq_moe_ext.nllb.hf_folder import HfFolder
from fairseq_moe_ext.nllb.hf_vocabulary import (
    FairseqVocabulary,
    fairseq_vocabulary,
    hf_rows,
    read_dictionary,
    read_vocabulary,
)
from fairseq_moe_ext.nllb.names import COMPUTED, NamedTensor
from fairseq_moe_ext.nllb.tokens import TAGS_OPTION

logger = logging.getLogger("fairseq_moe_ext")

HF_FIELDS = "hf_config"  # of extra_state: config.json's fields that fairseq has no place for
# the version of fairseq's encoder and decoder, which they keep as a tensor
CONSTANTS = {"encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0])}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST_MISSING = 1000  # a configuration can name any number


@dataclass(frozen=True)
class HfModel:
    """order: for each of fairseq's entries the row in the folder's embeddings, (V,) int64; None: the same rows.

    state: all of fairseq's checkpoint but the model.
    """

    vocabulary: FairseqVocabulary
    order: Tensor | None
    state: dict[str, Any]


def read_config(source: HfFolder, tensors: int) -> NllbConfig:
    """CheckpointError where config.json is no NLLB model's, or one of more layers than the folder's tensors allow."""
    config = NllbConfig.from_hf(source.config, str(source.path / "config.json"))
    try:
        config.check_counts(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path / 'config.json'}: {error}") from error
    if not config.has_moe_layers:
        logger.info("%s: a dense model without experts, converted as the dense model that it is", source.path)
    return config


def read_model(source: HfFolder, config: NllbConfig, dictionary: str | None) -> HfModel:
    """dictionary: the training's dict.txt; None: the SentencePiece model's order. CheckpointError where these or the
    tokenizer's files are of another vocabulary."""
    vocabulary, rows = _vocabulary(source.path, config, dictionary)
    order = None if rows == list(range(len(rows))) else torch.tensor(rows)
    return HfModel(vocabulary, order, _state(config, vocabulary, _dropped(source, config)))


def keys_of(tensor: NamedTensor) -> list[str]:
    """Under which a folder may have it; a model that was saved without its head has keys without `model.`."""
    return list(dict.fromkeys(key for name in tensor.hf for key in (name, name.removeprefix("model."))))


def match_keys(named: Iterable[NamedTensor], found: Collection[str], folder: str) -> dict[str, NamedTensor]:
    """Key in the folder -> its tensor; CheckpointError where one is missing or unknown."""
    tensors: dict[str, NamedTensor] = {}
    missing = []
    for tensor in named:
        there = [key for key in keys_of(tensor) if key in found]
        tensors |= dict.fromkeys(there, tensor)
        missing += [] if there else [tensor.hf[0]]
        if len(missing) > _MOST_MISSING:
            raise CheckpointError(f"{folder}: more than {_MOST_MISSING} tensors are missing, the first is {missing[0]}")
    unknown = sorted(set(found) - set(tensors) - set(COMPUTED))
    for keys, what in ((missing, "are missing"), (unknown, "are not NLLB's")):
        if keys:
            raise CheckpointError(f"{folder}: {len(keys)} tensors {what}, the first is {keys[0]}")
    return tensors


def match_tensors(named: Iterator[NamedTensor], found: Mapping[str, Any], folder: str) -> dict[str, NamedTensor]:
    """As `match_keys`, of found: key -> (shard, dtype, shape); also where one is of another shape or no float."""
    tensors = match_keys(named, found, folder)
    for key, tensor in tensors.items():
        check_tensor(key, tensor, *found[key])
    return tensors


def check_tensor(key: str, tensor: NamedTensor, shard: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """CheckpointError unless what lies in `shard` under `key` may be `tensor`."""
    if shape != tensor.shape:
        raise CheckpointError(f"{shard}: {key} must be {tensor.shape} by config.json, got {shape}")
    if dtype not in _FLOATS:
        raise CheckpointError(f"{shard}: {key} must be of {', '.join(map(str, _FLOATS))}, got {dtype}")


def check_gating(config: NllbConfig, gates: set[torch.dtype], folder: str, flag: str) -> None:
    """CheckpointError where fairseq's gate, whose weights are of `gates`, would compute in another dtype than the
    folder's says. flag: the option that sets the weights' dtype."""
    if config.router_dtype != "float32" and gates - {getattr(torch, config.router_dtype)}:
        raise CheckpointError(
            f"{Path(folder) / 'config.json'}: router_dtype must be float32 or the dtype of the weights, "
            f"{str(min(gates, key=str)).removeprefix('torch.')} ({flag}), got {config.router_dtype!r}"
        )


def _vocabulary(folder: Path, config: NllbConfig, dictionary: str | None) -> tuple[FairseqVocabulary, list[int]]:
    """fairseq's vocabulary, and for each of its entries the row in the folder's embeddings."""
    theirs = read_vocabulary(folder)
    words = None if dictionary is None else read_dictionary(Path(dictionary))
    try:
        ours = fairseq_vocabulary(theirs, words, config.vocabulary)
        rows = hf_rows(theirs, ours.names)
    except CheckpointError as error:
        raise CheckpointError(f"{dictionary or folder}: {error}") from error
    if theirs.added_words:
        logger.info(
            "%s: %d added tokens are no language codes: they are words of the dictionary, which SentencePiece's pieces "
            "do not hold: %s",
            *(folder, len(theirs.added_words), ", ".join(theirs.added_words[:5])),
        )
    if ours.tags_guessed:
        logger.info(
            "%s: three rows follow the languages, as in NLLB-200: by their number alone they pass for its tags (%s)",
            *(folder, TAGS_OPTION),
        )
    if ours.fillers:
        logger.info(
            "%s: %d rows of the embeddings have no token: they are kept, as madeupword0000 and so on in the dictionary",
            *(folder, ours.fillers),
        )
    return ours, rows


def _dropped(source: HfFolder, config: NllbConfig) -> dict[str, Any]:
    """Fields without a place in fairseq: said, and kept for the way back."""
    dropped = dropped_fields(source.config, not config.is_dense)
    shown = ", ".join(f"{name} {value!r:.40}" for name, value in sorted(dropped.items()) if name not in BOOKKEEPING)
    if shown:
        logger.info("%s: without effect in fairseq: %s", source.path / "config.json", shown)
    if config.padding_takes_slots:
        logger.info(
            "%s: router_ignore_padding_tokens true becomes use_moe_pad_mask False: static gating gives padding slots",
            source.path / "config.json",
        )
    if config.experts and config.capacity_fraction <= 0:
        logger.warning(
            "%s: moe_eval_capacity_token_fraction %s: transformers gives each expert expert_capacity slots, fairseq's "
            "static gating 2 * ceil(tokens / experts), as in training; dynamic gating has no capacity",
            *(source.path / "config.json", config.capacity_fraction),
        )
    return dropped


def _state(config: NllbConfig, vocabulary: FairseqVocabulary, dropped: dict[str, Any]) -> dict[str, Any]:
    task = {
        "task": "translation_multi_simple_epoch",
        "langs": vocabulary.languages,
        "encoder_langtok": "src",
        "decoder_langtok": True,
        "add_data_source_prefix_tags": TAGS_OPTION in vocabulary.options,
        "add_ssl_task_tokens": False,
    }
    args = Namespace(**{**vars(config.to_fairseq()), **task})
    return {
        "args": args,
        "cfg": None,
        "criterion": None,
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
        "task_state": {},
        "extra_state": {DICTIONARY_CHECKSUM: dictionary_checksum(vocabulary.names), HF_FIELDS: dropped},
    }
