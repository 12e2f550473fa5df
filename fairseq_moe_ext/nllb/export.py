"""A served translation checkpoint in Hugging Face's layout: config.json and safetensors shards with their index.

One shard at a time lies in memory. The folder gets its name when everything is in it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fairseq_moe_ext.atomic_file import WriteError, copy_file, new_file, write_json
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.conversion_lock import only_writer
from fairseq_moe_ext.checkpoints.dictionary_checksum import DICTIONARY_CHECKSUM, dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.plain_config import ConfigError, namespace
from fairseq_moe_ext.checkpoints.rounding import in_dtype
from fairseq_moe_ext.checkpoints.served_config import model_fields, task_fields
from fairseq_moe_ext.checkpoints.state_keys import GATE_KEY, expert_count, moe_layer_numbers
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor
from fairseq_moe_ext.nllb.config import SIDES, NllbConfig
from fairseq_moe_ext.nllb.fields import dropped_fields
from fairseq_moe_ext.nllb.hf_model import HF_FIELDS
from fairseq_moe_ext.nllb.hf_tokenizer import SPECIAL, TOKENIZER_FILES
from fairseq_moe_ext.nllb.hf_vocabulary import (
    HfVocabulary,
    fairseq_vocabulary,
    hf_rows,
    language_token,
    read_dictionary,
    read_vocabulary,
)
from fairseq_moe_ext.nllb.names import NamedTensor, named_tensors
from fairseq_moe_ext.nllb.tokens import extra_tokens_of

logger = logging.getLogger("fairseq_moe_ext")

SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
# what fairseq keeps and Hugging Face computes
_COMPUTED = tuple(f"{side}.{name}" for side in SIDES for name in ("version", "embed_positions._float_tensor"))


def export_hf(
    checkpoint: str,
    folder: str,
    dictionary: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write the checkpoint as the new folder `folder`; returns its files.

    tokenizer: a folder whose tokenizer files are copied and name the rows, with `dictionary`, the checkpoint's
    dict.txt; without it the rows keep fairseq's order. dtype: of all weights; None: as they are. CheckpointError where
    the model is not of NLLB's kind, a tensor has no place in that layout, or the folder is there already.
    """
    target = Path(folder)
    _check_new(target)
    state = read_checkpoint(checkpoint)
    model = state["model"]
    config = _config(checkpoint, state, dtype)
    kept = _kept_fields(checkpoint, state, config)
    _tell_capacity(checkpoint, config)
    named = list(islice(named_tensors(config), len(model) + 1))  # a configuration can name any number
    _check_complete(checkpoint, model, named)
    order = _order(state, config, dictionary, tokenizer)
    with _new_folder(target) as partial:
        for name in TOKENIZER_FILES if tokenizer is not None else ():
            if (Path(tokenizer) / name).is_file():
                copy_file(Path(tokenizer) / name, partial / name)
        dtypes = {model[tensor.fairseq[0]].dtype if dtype is None else dtype for tensor in named}
        written = str(next(iter(dtypes))).removeprefix("torch.") if len(dtypes) == 1 else "float32"
        field = "dtype" if "dtype" in kept else "torch_dtype"  # its name since transformers 4.56, and before
        write_json(partial / "config.json", {**kept, **config.to_hf(), field: written}, indent=2)
        _write_shards(partial, model, named, order, dtype, shard_bytes)
    return sorted(target.iterdir())


def _check_new(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target}: it exists already: the converted model goes into a new folder")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which is `target` when the context ends without an error; after one it is gone."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target}: it cannot be written: {error.strerror}") from error
    with only_writer(target):
        _check_new(target)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            partial.rename(target)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = error.reason if isinstance(error, WriteError) else one_line(error)
            raise CheckpointError(f"{target}: it cannot be written: {reason}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _config(checkpoint: str, state: dict[str, Any], dtype: torch.dtype | None) -> NllbConfig:
    model = state["model"]
    embeddings = model.get("encoder.embed_tokens.weight")
    try:
        args = namespace(model_fields(state))
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    if embeddings is None:
        raise CheckpointError(f"{checkpoint}: it must be a translation model with its arguments")
    moe_layers = {side: moe_layer_numbers(model, side) for side in SIDES}
    gates = [tensor.dtype for key, tensor in model.items() if GATE_KEY.match(key)]
    written = str(dtype or (gates or [embeddings.dtype])[0]).removeprefix("torch.")
    try:
        config = NllbConfig.from_fairseq(args, moe_layers, embeddings.size(0), expert_count(model), written)
        config.check_counts(len(model))
        return config
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error


def _extra(state: dict[str, Any], name: str) -> Any:
    extra_state = state.get("extra_state")
    return extra_state.get(name) if isinstance(extra_state, dict) else None


def _kept_fields(checkpoint: str, state: dict[str, Any], config: NllbConfig) -> dict[str, Any]:
    """What the folder that the checkpoint was converted from said besides.

    Where the evaluation has no capacity of its own, transformers reads expert_capacity; unset it is fairseq's rule.
    """
    kept = _extra(state, HF_FIELDS)
    if kept is None:
        return {"expert_capacity": None} if config.experts and config.capacity_fraction <= 0 else {}
    try:
        json.dumps(kept, allow_nan=False)
        return dropped_fields(kept, not config.is_dense)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}: its {HF_FIELDS} must be an object of JSON: {one_line(error)}") from error


def _tell_capacity(checkpoint: str, config: NllbConfig) -> None:
    """transformers has no dynamic gating."""
    if config.has_moe_layers and config.capacity_fraction < 1:
        has_share = config.capacity_fraction > 0
        logger.warning(
            "%s: moe_eval_capacity_token_fraction %s: transformers drops what is beyond %s, as static gating "
            "does; dynamic gating drops nothing",
            *(checkpoint, config.capacity_fraction),
            "this share of the tokens" if has_share else "expert_capacity, or if it is unset the first batch's share",
        )


def _check_complete(checkpoint: str, model: dict[str, Tensor], named: list[NamedTensor]) -> None:
    known = {name for tensor in named for name in tensor.fairseq}
    for keys, what in (
        ([tensor.fairseq[0] for tensor in named if tensor.fairseq[0] not in model], "are missing"),
        ([key for key in model if key not in known and key not in _COMPUTED], "have no place in Hugging Face's layout"),
    ):
        if keys:
            raise CheckpointError(f"{checkpoint}: {len(keys)} tensors {what}, the first is {keys[0]}")


def _order(state: dict[str, Any], config: NllbConfig, dictionary: str | None, tokenizer: str | None) -> Tensor | None:
    """For each row of Hugging Face's embeddings fairseq's; None: the same."""
    if tokenizer is None:
        if dictionary is not None:
            raise CheckpointError(
                "--dictionary goes with --tokenizer, which names the rows that it is to be matched with"
            )
        return None
    theirs = read_vocabulary(Path(tokenizer))
    words = None if dictionary is None else read_dictionary(Path(dictionary))
    try:
        names = _names(state, config, theirs, words)
        return torch.tensor(hf_rows(theirs, names)).argsort()
    except CheckpointError as error:
        raise CheckpointError(f"{dictionary or tokenizer}: {error}") from error


def _names(state: dict[str, Any], config: NllbConfig, theirs: HfVocabulary, words: list[str] | None) -> list[str]:
    """fairseq's name of every row: as the conversion gave them, or by the checkpoint's own languages and options.

    CheckpointError where they cannot be those that the checkpoint was trained, or converted, with.
    """
    args, checksum = namespace(task_fields(state)), _extra(state, DICTIONARY_CHECKSUM)
    languages = getattr(args, "langs", None)
    if isinstance(languages, str):
        languages = languages.split(",")
    if checksum is not None:
        names = fairseq_vocabulary(theirs, words, config.vocabulary).names
        if checksum != dictionary_checksum(names):
            raise CheckpointError(
                "the dictionary must be the one that the checkpoint was converted with, in its order: its checksum is "
                "another (--dictionary)"
            )
        return names
    if words is None:
        raise CheckpointError("--dictionary must be given: the checkpoint does not say in which order its words are")
    if languages is None:
        return fairseq_vocabulary(theirs, words, config.vocabulary).names
    known = {*SPECIAL, *words}
    tokens = [*map(language_token, languages), *extra_tokens_of(args)]
    names = [*SPECIAL, *words, *(token for token in tokens if token not in known)]
    if len(names) != config.vocabulary:
        raise CheckpointError(
            f"the dictionary is of another vocabulary: with the checkpoint's languages and options it has {len(names)} "
            f"entries, the embeddings have {config.vocabulary} rows"
        )
    return names


def _write_shards(
    folder: Path,
    model: dict[str, Tensor],
    named: list[NamedTensor],
    order: Tensor | None,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    sizes = {}
    for tensor in named:
        values = model[tensor.fairseq[0]]
        sizes[tensor] = values.numel() * (dtype or values.dtype).itemsize
    shards = list(_shards(sizes, shard_bytes))
    weight_map = {}
    with tqdm(total=sum(sizes.values()), desc=f"writing {folder.stem}", unit="B", unit_scale=True) as bar:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {}
            for tensor in shard:
                values = model[tensor.fairseq[0]]
                values = values.read() if isinstance(values, StoredTensor) else values.clone()
                values = values[order] if tensor.rows and order is not None else values
                tensors[tensor.hf[0]] = in_dtype(
                    values, dtype or values.dtype, tensor.fairseq[0], "--dtype"
                ).contiguous()
                bar.update(sizes[tensor])
            with new_file(folder / name) as file:
                save_file(tensors, file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / _INDEX, index, indent=2)


def _shards(sizes: dict[NamedTensor, int], shard_bytes: int) -> Iterator[list[NamedTensor]]:
    shard: list[NamedTensor] = []
    filled = 0
    for tensor, size in sizes.items():
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += size
    yield shard
