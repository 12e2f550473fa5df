"""NLLB from Hugging Face's layout to one checkpoint that fairseq serves, shard by shard.

No more than one shard lies in memory. What is written is read at its records' offsets, so it is a disk store as it is.
"""

from __future__ import annotations

import hashlib
import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fairseq_moe_ext.atomic_file import write_text
from fairseq_moe_ext.checkpoints.conversion_lock import only_writer
from fairseq_moe_ext.checkpoints.dictionary_checksum import DICTIONARY_CHECKSUM, dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.record_writer import RecordWriter
from fairseq_moe_ext.checkpoints.state_keys import GATE_KEY
from fairseq_moe_ext.nllb.config import NllbConfig
from fairseq_moe_ext.nllb.fields import BOOKKEEPING, dropped_fields
from fairseq_moe_ext.nllb.hf_folder import HfFolder, values
from fairseq_moe_ext.nllb.hf_vocabulary import (
    FairseqVocabulary,
    fairseq_vocabulary,
    hf_rows,
    read_dictionary,
    read_vocabulary,
)
from fairseq_moe_ext.nllb.names import COMPUTED, NamedTensor, named_tensors
from fairseq_moe_ext.nllb.tokens import TAGS_OPTION

logger = logging.getLogger("fairseq_moe_ext")

_MOST_MISSING = 1000  # a configuration can name any number
_PIECE = 1 << 26  # bytes of a tensor that are converted at a time
_VERSION = 3.0  # of fairseq's encoder and decoder, which they keep as a tensor
HF_FIELDS = "hf_config"  # of extra_state: config.json's fields that fairseq has no place for
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_VERSIONS = ("encoder.version", "decoder.version")


@dataclass(frozen=True)
class Converted:
    """files: checkpoint, dictionary, languages. task_flags: what the task needs for this vocabulary."""

    files: list[Path]
    config: NllbConfig
    task_flags: str


def convert_nllb(
    folder: str, target: str, dictionary: str | None = None, dtype: torch.dtype | None = None, force: bool = False
) -> Converted:
    """Write the model in `folder` as the checkpoint `target`, X.pt, with X.dict.txt and X.langs.txt beside it.

    dictionary: the training's dict.txt, whose order the embeddings' rows take; without it the SentencePiece model's
    order. dtype: of all weights; None: as they are. CheckpointError where the folder or the dictionary is wrong, where
    `target` exists and force is not given, or where it cannot be written. A broken-off run goes on where it was.
    """
    file = _target(target)
    with only_writer(file):
        if file.exists() and not force:
            raise CheckpointError(f"{file}: it exists already: give --force to overwrite it")
        return _convert(folder, file, dictionary, dtype)


def _convert(folder: str, file: Path, dictionary: str | None, dtype: torch.dtype | None) -> Converted:
    source = HfFolder(Path(folder))
    config = NllbConfig.from_hf(source.config, str(source.path / "config.json"))
    found = source.shapes()
    try:
        config.check_counts(len(found))
    except CheckpointError as error:
        raise CheckpointError(f"{source.path / 'config.json'}: {error}") from error
    if not config.has_moe_layers:
        logger.info("%s: a dense model without experts, converted as the dense model that it is", folder)
    tensors = match_tensors(named_tensors(config), found, folder)
    vocabulary, rows = _vocabulary(source.path, config, dictionary)
    shapes: dict[tuple[str, ...], tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        shapes.setdefault(tensor.fairseq, (dtype or found[key][1], tensor.shape))
    _check_gating(config, shapes, folder)
    shapes |= {(name,): (torch.float32, (1,)) for name in _VERSIONS}
    state = _state(config, vocabulary, _dropped(source, config))
    writer = RecordWriter(file, state, shapes, _fingerprint(source, shapes, state))
    for name in _VERSIONS:
        writer.write(name, [torch.tensor([_VERSION])])
    order = None if rows == list(range(len(rows))) else torch.tensor(rows)
    total = sum(shard.stat().st_size for shard in source.shards)
    with tqdm(total=total, desc=f"converting {folder}", unit="B", unit_scale=True) as bar:
        for shard in source.shards:
            if not writer.is_done(shard.name):
                for key, tensor in source.read(shard).items():
                    if key in tensors:
                        named = tensors[key]
                        chosen = order if named.rows else None
                        pieces = _pieces(values(tensor), shapes[named.fairseq][0], chosen, f"{shard.name}: {key}")
                        writer.write(named.fairseq[0], pieces)
                writer.finish(shard.name)
            bar.update(shard.stat().st_size)
    files = [file, *_write_vocabulary(file, vocabulary)]
    writer.complete()
    return Converted(files, config, task_flags(vocabulary))


def match_tensors(named: Iterator[NamedTensor], found: Mapping[str, Any], folder: str) -> dict[str, NamedTensor]:
    """Key in the folder -> its tensor; CheckpointError where one is missing, unknown, of another shape or no float.

    found: key -> (shard, dtype, shape). A model that was saved without its head has keys without the prefix `model.`.
    """
    tensors: dict[str, NamedTensor] = {}
    missing = []
    for tensor in named:
        keys = dict.fromkeys(key for name in tensor.hf for key in (name, name.removeprefix("model.")))
        there = [key for key in keys if key in found]
        tensors |= dict.fromkeys(there, tensor)
        missing += [] if there else [tensor.hf[0]]
        if len(missing) > _MOST_MISSING:
            raise CheckpointError(f"{folder}: more than {_MOST_MISSING} tensors are missing, the first is {missing[0]}")
        for key in there:
            shard, dtype, shape = found[key]
            if shape != tensor.shape:
                raise CheckpointError(f"{shard}: {key} must be {tensor.shape} by config.json, got {shape}")
            if dtype not in FLOATS:
                raise CheckpointError(f"{shard}: {key} must be of {', '.join(map(str, FLOATS))}, got {dtype}")
    unknown = sorted(set(found) - set(tensors) - set(COMPUTED))
    for keys, what in ((missing, "are missing"), (unknown, "are not NLLB's")):
        if keys:
            raise CheckpointError(f"{folder}: {len(keys)} tensors {what}, the first is {keys[0]}")
    return tensors


def task_flags(vocabulary: FairseqVocabulary) -> str:
    """The options of fairseq's task that this vocabulary is served with."""
    return f"--encoder-langtok src --decoder-langtok {vocabulary.options}".strip()


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


def _target(target: str) -> Path:
    file = Path(target)
    if file.suffix != ".pt" or not file.parent.is_dir():
        raise CheckpointError(f"{target}: the new checkpoint must be named X.pt in an existing folder")
    return file


def _check_gating(config: NllbConfig, shapes: Mapping[tuple[str, ...], tuple], folder: str) -> None:
    """CheckpointError where fairseq's gate would compute in another dtype than the folder's says."""
    written = {dtype for names, (dtype, _) in shapes.items() if GATE_KEY.match(names[0])}
    if config.router_dtype != "float32" and written - {getattr(torch, config.router_dtype)}:
        raise CheckpointError(
            f"{Path(folder) / 'config.json'}: router_dtype must be float32 or the dtype of the weights, "
            f"{str(written.pop()).removeprefix('torch.')} (--dtype), got {config.router_dtype!r}"
        )


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
    """All of the checkpoint but the model."""
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


def _fingerprint(source: HfFolder, shapes: Mapping, state: dict[str, Any]) -> str:
    files = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in source.shards]
    content = repr((files, sorted(source.config.items()), list(shapes.items()), state))
    return hashlib.sha256(content.encode()).hexdigest()


def _pieces(tensor: Tensor, dtype: torch.dtype, order: Tensor | None, name: str) -> Iterator[Tensor]:
    """`tensor[order]` in `dtype`, some rows at a time; order: (V,) int64, or None: as they are."""
    step = max(1, _PIECE // max(1, tensor[0].numel() * dtype.itemsize)) if tensor.dim() > 1 else len(tensor)
    for start in range(0, len(tensor), step):
        part = slice(start, start + step)
        yield in_dtype(tensor[part if order is None else order[part]], dtype, name)


def in_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` rounded to `dtype`; CheckpointError where a number would become infinite."""
    result = tensor.to(dtype)
    most = torch.finfo(dtype).max
    if most < torch.finfo(tensor.dtype).max and (result.isinf() & ~tensor.isinf()).any():
        raise CheckpointError(
            f"--dtype must hold the values of {name}, up to {tensor[~tensor.isinf()].abs().max():g}, got "
            f"{str(dtype).removeprefix('torch.')}, which ends at {most:g}"
        )
    return result


def _write_vocabulary(file: Path, vocabulary: FairseqVocabulary) -> Sequence[Path]:
    words = "".join(f"{word} 1\n" for word in vocabulary.words)
    texts = {"dict": words, "langs": "".join(f"{code}\n" for code in vocabulary.languages)}
    files = []
    for kind, text in texts.items():
        files.append(file.with_name(f"{file.stem}.{kind}.txt"))
        write_text(files[-1], text)
    return files
