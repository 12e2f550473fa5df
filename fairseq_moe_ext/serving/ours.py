"""Which checkpoints are this plugin's to load, told by the names in their pickles alone; nothing in them is called."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.find_files import find_checkpoint_files
from fairseq_moe_ext.checkpoints.quantized_state import is_quantized
from fairseq_moe_ext.checkpoints.record_file import MAGIC

_PACKAGE = __package__.split(".")[0]
_OF_EXPERTS = ".moe_layer.gate."  # in a key of the model's state; rank files have no gates, their shared file has
_OLD_PICKLES = 4  # of the old format: magic number, version, system, content


def is_ours(path: str) -> bool:
    """Whether a local checkpoint has experts, or names a task or an architecture of this plugin; quantised ones do.

    False for whatever is no checkpoint of one file or of upstream's files: a path that fairseq fetches, a damaged file.
    """
    try:
        files = find_checkpoint_files(path)
        if is_quantized(files.first):
            return True
        names = ({*TASK_REGISTRY, *ARCH_MODEL_REGISTRY}) - set(_fairseqs())
        return any(_OF_EXPERTS in text or text in names for text in _texts(files.first))
    except (CheckpointError, OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return False


def is_served_task(name: str | None) -> bool:
    """Whether a task of this plugin bears the name."""
    return name in TASK_REGISTRY and name not in _fairseqs()


def _fairseqs() -> Iterator[str]:
    for registry in (TASK_REGISTRY, ARCH_MODEL_REGISTRY):
        for name, registered in registry.items():
            if registered.__module__.split(".")[0] != _PACKAGE:
                yield name


def _texts(file: Path) -> Iterator[str]:
    """The words in what `torch.save` wrote."""
    with open(file, "rb") as opened:
        is_archive = opened.read(len(MAGIC)) == MAGIC
        opened.seek(0)
        if is_archive:
            with zipfile.ZipFile(opened) as archive:
                name = [name for name in archive.namelist() if name.endswith("/data.pkl")][0]
                with archive.open(name) as pickled:
                    yield from _words(pickled)
        else:
            for _ in range(_OLD_PICKLES):
                yield from _words(opened)


def _words(pickled: BinaryIO) -> Iterator[str]:
    for _, value, _ in pickletools.genops(pickled):
        if isinstance(value, str):
            yield value
