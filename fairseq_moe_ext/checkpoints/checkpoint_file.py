"""One checkpoint file -> its content, the tensors left in the file where its format allows that."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.pickle_rules import check_pickles
from fairseq_moe_ext.checkpoints.plain_config import ConfigError, plain, shown
from fairseq_moe_ext.checkpoints.record_file import MAGIC, RecordFile
from fairseq_moe_ext.checkpoints.safe_loader import load_safely, revive
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor, check_tensor

OPTIMIZER = "last_optimizer_state"  # the bulk of a file, never read
_OLD_PICKLES = 5  # in a file of the old format: magic number, version, system, content, keys of the storages
LONGEST_NAME = 500
SHARING = 4  # a model's tensors take at most so many times the bytes of the records that they lie in


@dataclass(frozen=True)
class FileContent:
    """What lies in a file, or in several as one.

    state: without the optimizer's; had_optimizer: whether it was there.
    """

    state: dict[str, Any]
    had_optimizer: bool


def read_file(file: Path, loading: Loading) -> FileContent:
    """The content of one file.

    Tensors are StoredTensors, but in files of the old format (before PyTorch 1.6), which can only be read as a whole
    and carry no checksums. The configuration is plain data.
    """
    state, records = read_pickle(file, loading)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{file}: not a fairseq checkpoint: it must hold a dict with the key 'model'")
    _check_tensors(file, state["model"], records)
    had_optimizer = state.pop(OPTIMIZER, None) is not None
    if records is None:
        loading.count(sum(tensor.nbytes for tensor in state["model"].values()))
    try:
        for name in ("cfg", "args"):
            if name in state:
                state[name] = plain(state[name])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return FileContent(state, had_optimizer)


def read_pickle(file: Path, loading: Loading) -> tuple[Any, RecordFile | None]:
    """(what `torch.save` wrote into `file`, the open archive); as in `read_file`, whatever it is.

    CheckpointError where the file is none, or asks for more than a file of its size can need.
    """
    try:
        if not file.is_file():  # opening a FIFO would wait for its writer
            raise CheckpointError(f"{file}: not a readable checkpoint: it must be there as a regular file")
        if not file.stat().st_size:
            raise CheckpointError(f"{file}: not a readable checkpoint: it is empty; did its download break off?")
        with open(file, "rb") as opened:
            is_archive = opened.read(len(MAGIC)) == MAGIC
            if not is_archive:
                opened.seek(0)
                size = file.stat().st_size
                check_pickles(opened, _OLD_PICKLES, size, file)
                after_pickles = size - opened.tell()
    except OSError as error:
        raise CheckpointError(f"{file}: not a readable checkpoint: {error.strerror}") from error
    if is_archive:
        records = RecordFile(file, loading)
        check_pickles(io.BytesIO(records.pickle()), 1, file.stat().st_size, file)
    else:
        records = None
    content = load_safely(file, "meta" if is_archive else "cpu")
    storages: dict[int, int] = {}  # of the old format: address -> bytes

    def tensor_of(tensor: torch.Tensor) -> torch.Tensor:
        if is_archive:
            return StoredTensor(tensor, records)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        content = revive(content, tensor_of)
    except RecursionError:
        raise CheckpointError(f"{file}: not a readable checkpoint: RecursionError: it is nested too deep") from None
    # PyTorch fills the storages that the file lists, and leaves others as the memory was
    if not is_archive and sum(storages.values()) > after_pickles:
        raise CheckpointError(
            f"{file}: the bytes of its tensors, {sum(storages.values()):,}, must all be in it, got {after_pickles:,}"
        )
    return content, records


def check_names(file: Path, tensors: dict) -> None:
    """CheckpointError, which calls `file`'s content a mapping, where a name is none, or one that no module has."""
    for key, value in dict.items(tensors):
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file}: it must map names to tensors, got {shown(key)}: {type(value).__name__}")
        if len(key) > LONGEST_NAME:
            raise CheckpointError(f"{file}: a tensor's name must have at most {LONGEST_NAME} letters, got {shown(key)}")


def _check_tensors(file: Path, model: dict, records: RecordFile | None) -> None:
    check_names(file, model)
    for key, value in dict.items(model):
        if records is None:
            check_tensor(value, f"{file}: {shown(key)}")
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in dict.values(model))
    there = file.stat().st_size if records is None else records.tensor_bytes
    if wanted > SHARING * there + (1 << 20):
        raise CheckpointError(
            f"{file}: its tensors must take at most {SHARING} times the {there:,} bytes that it holds of them, got "
            f"{wanted:,} bytes"
        )
