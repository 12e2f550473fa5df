"""A checkpoint file as `torch.save` would write it, but piece by piece (partial_file.py).

It has a checksum per record, so that it serves as a disk store as it is.
"""

from __future__ import annotations

import errno
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_moe_ext.checkpoints.checkpoint_file import read_file
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.partial_file import PartialFile

_ENTRY, _ENTRY_SIGNATURE = 46, b"PK\x01\x02"  # a central directory entry before its name
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"


class RecordWriter(PartialFile):
    """Writes the tensors of `shapes` into the checkpoint `target`, each by the first of its names; as PartialFile.

    shapes: names that share one tensor -> (dtype, shape). state: what else the file holds.
    """

    def __init__(
        self,
        target: Path,
        state: dict[str, Any],
        shapes: Mapping[tuple[str, ...], tuple[torch.dtype, tuple[int, ...]]],
        fingerprint: str,
    ):
        super().__init__(target, fingerprint)
        self._state, self._shapes = state, shapes
        self.open()

    def _begin(self) -> None:
        self._check_room(sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self._shapes.values()))
        model: dict[str, Tensor] = {}
        with FakeTensorMode():  # shapes without memory
            for names, (dtype, shape) in self._shapes.items():
                model |= dict.fromkeys(names, torch.empty(shape, dtype=dtype))
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**self._state, "model": model}, self._partial)

    def _find_places(self) -> dict[str, tuple[int, int]]:
        model = read_file(self._partial, Loading(str(self._partial))).state["model"]
        return {names[0]: (model[names[0]].place[1], model[names[0]].nbytes) for names in self._shapes}

    def _seal(self, checksums: Mapping[str, int]) -> None:
        _set_checksums(self._file, {self._places[name][0]: checksum for name, checksum in checksums.items()})


def _set_checksums(file: Any, by_offset: Mapping[int, int]) -> None:
    """Write the records' CRC-32 where a zip archive keeps it: after the record's bytes and in the directory.

    by_offset: where a record's bytes begin -> its checksum.
    """
    with zipfile.ZipFile(file) as archive:
        entries, position = archive.infolist(), archive.start_dir
    for entry in entries:
        directory = os.pread(file.fileno(), _ENTRY, position)
        if directory[:4] != _ENTRY_SIGNATURE:
            raise OSError(errno.EIO, "the archive's directory is damaged")
        name, extra, comment = struct.unpack("<HHH", directory[28:34])
        lengths = os.pread(file.fileno(), 4, entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", lengths))
        if start in by_offset:
            checksum = struct.pack("<I", by_offset[start])
            os.pwrite(file.fileno(), checksum, position + 16)
            if os.pread(file.fileno(), 4, start + entry.file_size) == _DESCRIPTOR_SIGNATURE:
                os.pwrite(file.fileno(), checksum, start + entry.file_size + 4)
        position += _ENTRY + name + extra + comment
