"""A checkpoint file written piece by piece at its tensors' places, in any order and over several runs.

The file is what `torch.save` would write, with a checksum per record, so that it serves as a disk store as it is. It
grows under `X.pt.partial`; `X.pt.partial.json` says which parts are done; only a complete one gets its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_moe_ext.atomic_file import WriteError, give_name, write_json
from fairseq_moe_ext.checkpoints.checkpoint_file import read_file
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.loading import Loading

_ENTRY, _ENTRY_SIGNATURE = 46, b"PK\x01\x02"  # a central directory entry before its name
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"


class RecordWriter:
    """Writes the tensors of `shapes` into the checkpoint `target`.

    shapes: names that share one tensor -> (dtype, shape). state: what else the file holds. fingerprint: of what the
    values come from; what an earlier run of the same fingerprint has done is kept. CheckpointError without space. The
    caller sees to it that it is the only one (conversion_lock.py).
    """

    def __init__(
        self,
        target: Path,
        state: dict[str, Any],
        shapes: Mapping[tuple[str, ...], tuple[torch.dtype, tuple[int, ...]]],
        fingerprint: str,
    ):
        self.target = target
        real = Path(os.path.realpath(target))
        self._partial = real.with_name(f"{real.name}.partial")
        self._journal = real.with_name(f"{real.name}.partial.json")
        self._fingerprint = fingerprint
        self._done: list[str] = []
        self._checksums: dict[str, int] = {}
        try:
            if not self._resume():
                self._begin(state, shapes)
            self._places = self._find_places(shapes)
            self._file = open(self._partial, "r+b")  # noqa: SIM115  closed in complete or with the object
        except (OSError, RuntimeError) as error:
            raise self._no_space(error) from error

    def is_done(self, part: str) -> bool:
        """Whether all of `part` has been written."""
        return part in self._done

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Fill the tensor whose first name is `name`; if it has values already they must be these."""
        offset, size = self._places[name]
        known, checksum, position = self._checksums.get(name), 0, 0
        for piece in pieces:
            view = memoryview(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            checksum = zlib.crc32(view, checksum)
            try:
                if known is None:
                    _write_all(self._file.fileno(), view, offset + position)
            except OSError as error:
                raise self._no_space(error) from error
            position += len(view)
        if position != size:
            raise CheckpointError(f"{self.target}: {name} must have {size} bytes, got {position}")
        if known not in (None, checksum):
            raise CheckpointError(f"{self.target}: {name} must be one tensor, found two with different values")
        self._checksums[name] = checksum

    def finish(self, part: str) -> None:
        """Note that everything of `part` is on the disk."""
        try:
            os.fsync(self._file.fileno())
            self._note(part)
        except OSError as error:
            raise self._no_space(error) from error

    def complete(self) -> None:
        """Give the file its checksums and its name; CheckpointError where a tensor was never written."""
        missing = [name for name in self._places if name not in self._checksums]
        if missing:
            raise CheckpointError(f"{self.target}: {len(missing)} tensors have no values, the first is {missing[0]}")
        by_offset = {self._places[name][0]: checksum for name, checksum in self._checksums.items()}
        try:
            _set_checksums(self._file, by_offset)
            os.fsync(self._file.fileno())
            self._file.close()
            give_name(self._partial, self.target)
            self._journal.unlink()
        except OSError as error:
            raise self._no_space(error) from error

    def _resume(self) -> bool:
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not self._partial.is_file() or journal.get("fingerprint") != self._fingerprint:
            return False
        self._done, self._checksums = journal["done"], journal["checksums"]
        return True

    def _begin(self, state: dict[str, Any], shapes: Mapping) -> None:
        self._journal.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)
        needed = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes.values())
        free = shutil.disk_usage(self._partial.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} free")
        model: dict[str, Tensor] = {}
        with FakeTensorMode():  # shapes without memory
            for names, (dtype, shape) in shapes.items():
                model |= dict.fromkeys(names, torch.empty(shape, dtype=dtype))
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**state, "model": model}, self._partial)
        self._note(None)

    def _find_places(self, shapes: Mapping) -> dict[str, tuple[int, int]]:
        """First name -> (offset, bytes)."""
        model = read_file(self._partial, Loading(str(self._partial))).state["model"]
        return {names[0]: (model[names[0]].place[1], model[names[0]].nbytes) for names in shapes}

    def _note(self, part: str | None) -> None:
        self._done += [] if part is None else [part]
        content = {"fingerprint": self._fingerprint, "done": self._done, "checksums": self._checksums}
        write_json(self._journal, content, indent=None)

    def _no_space(self, error: Exception) -> CheckpointError:
        # torch's own writer has a RuntimeError for a full disk
        if isinstance(error, WriteError):
            return CheckpointError(f"{self.target}: it cannot be written: {error.reason}")
        reason = getattr(error, "strerror", None) or f"is the disk full? {one_line(error)}"
        return CheckpointError(f"{self.target}: it cannot be written: {reason}")


def _write_all(file: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(file, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


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
