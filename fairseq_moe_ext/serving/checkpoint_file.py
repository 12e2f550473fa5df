"""One checkpoint file -> its content, the tensors left in the file where its format allows that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.loading import Loading
from fairseq_moe_ext.serving.record_file import MAGIC, RecordFile
from fairseq_moe_ext.serving.safe_loader import load_safely, revive
from fairseq_moe_ext.serving.stored_tensor import StoredTensor

OPTIMIZER = "last_optimizer_state"  # the bulk of a file, never read


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
    and carry no checksums.
    """
    try:
        with open(file, "rb") as opened:
            is_archive = opened.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{file}: not a readable checkpoint: {error.strerror}") from error
    records = RecordFile(file, loading) if is_archive else None
    state = load_safely(file, "cpu" if records is None else "meta")
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{file}: not a fairseq checkpoint: it must hold a dict with the key 'model'")
    for key, value in state["model"].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file}: its 'model' must map names to tensors, got {key!r}: {type(value).__name__}")
    had_optimizer = state.pop(OPTIMIZER, None) is not None
    if records is None:
        state = revive(state, lambda tensor: tensor)
        loading.count(sum(tensor.nbytes for tensor in state["model"].values()))
    else:
        state = revive(state, lambda tensor: StoredTensor(tensor, records))
    return FileContent(state, had_optimizer)
