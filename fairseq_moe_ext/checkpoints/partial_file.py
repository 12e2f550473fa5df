"""A file written piece by piece at its tensors' places, in any order and over several runs.

It grows under `X.partial`; `X.partial.json` says which parts are done; only a complete file gets its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_ext.atomic_file import WriteError, give_name, write_json
from fairseq_moe_ext.buffering.file_reading import read_at
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line


def partial_files(target: Path) -> tuple[Path, Path]:
    """What is written of `target`, and the journal beside it."""
    real = Path(os.path.realpath(target))
    return real.with_name(f"{real.name}.partial"), real.with_name(f"{real.name}.partial.json")


class PartialFile(ABC):
    """Writes tensors into `target`, each under its name.

    fingerprint: of what the values come from and of the file's layout; what an earlier run of the same fingerprint has
    done is kept. CheckpointError without space. The caller sees to it that it is the only one (conversion_lock.py), and
    calls `open` first.
    """

    def __init__(self, target: Path, fingerprint: str):
        self.target = target
        self._partial, self._journal = partial_files(target)
        self._fingerprint = fingerprint
        self._done: dict[str, Any] = {}
        self._checksums: dict[str, int] = {}
        self._begun: dict[str, list[str]] = {}  # tensor -> what of it is written already ...
        self._begun_checksums: dict[str, int] = {}  # ... and the CRC-32 of that

    def open(self) -> None:
        """Go on with what is there, or begin."""
        try:
            if not self._resume():
                self._journal.unlink(missing_ok=True)
                self._partial.unlink(missing_ok=True)
                try:
                    self._begin()
                    self._write_journal()
                except BaseException:
                    self._partial.unlink(missing_ok=True)
                    raise
            self._places = self._find_places()
            self._file = open(self._partial, "r+b")  # noqa: SIM115  closed in complete or with the object
        except (OSError, RuntimeError) as error:
            raise self._no_space(error) from error

    @abstractmethod
    def _begin(self) -> None:
        """Make `self._partial`, without the tensors' values; OSError or RuntimeError without space."""

    @abstractmethod
    def _find_places(self) -> dict[str, tuple[int, int]]:
        """Of the tensors in `self._partial`: name -> (offset, bytes)."""

    @abstractmethod
    def _seal(self, checksums: Mapping[str, int]) -> None:
        """Write what could only be known at the end into `self._file`; checksums: CRC-32 by name."""

    def is_done(self, part: str) -> bool:
        """Whether all of `part` has been written."""
        return part in self._done

    @property
    def notes(self) -> dict[str, Any]:
        """What was noted of the parts that are done."""
        return dict(self._done)

    def begun(self, name: str) -> list[str]:
        """Which pieces of a tensor, that comes from several parts, `write_begun` has written."""
        return list(self._begun.get(name, ()))

    def write_begun(self, name: str, values: Tensor, pieces: list[str]) -> None:
        """Keep a tensor of which only `pieces` are there yet."""
        offset, _ = self._places[name]
        try:
            _write_all(self._file.fileno(), _bytes_of(values), offset)
        except OSError as error:
            raise self._no_space(error) from error
        self._begun[name], self._begun_checksums[name] = pieces, zlib.crc32(_bytes_of(values))

    def read_begun(self, name: str, target: Tensor) -> bool:
        """What `write_begun` has kept, into `target`; False where a run that was broken off has written over it."""
        offset, _ = self._places[name]
        return read_at(self._file.fileno(), _bytes_of(target), offset, 0) == self._begun_checksums.get(name)

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Fill the tensor called `name`; if it has values already they must be these."""
        offset, size = self._places[name]
        known, checksum, position = self._checksums.get(name), 0, 0
        for piece in pieces:
            view = _bytes_of(piece.detach().contiguous())
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
        self._begun.pop(name, None)
        self._begun_checksums.pop(name, None)

    def finish(self, part: str, note: Any = None) -> None:
        """Everything of `part` is written: put it on the disk, with `note`, which JSON can say."""
        self._done[part] = note
        try:
            os.fsync(self._file.fileno())
            self._write_journal()
        except OSError as error:
            raise self._no_space(error) from error

    def discard(self) -> None:
        """Nothing of it is kept."""
        self._file.close()
        self._journal.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)

    def complete(self) -> None:
        """Give the file its checksums and its name; CheckpointError where a tensor was never written."""
        missing = [name for name in self._places if name not in self._checksums]
        if missing:
            raise CheckpointError(f"{self.target}: {len(missing)} tensors have no values, the first is {missing[0]}")
        try:
            self._seal(self._checksums)
            os.fsync(self._file.fileno())
            self._file.close()
            give_name(self._partial, self.target)
            self._journal.unlink()
        except OSError as error:
            raise self._no_space(error) from error

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self._partial.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} free")

    def _reserve(self, head: bytes, size: int) -> None:
        """A partial file of `head` and `size` bytes more, which the disk then has."""
        self._check_room(len(head) + size)
        with open(self._partial, "xb") as file:
            file.write(head)
            file.flush()
            if size:
                os.posix_fallocate(file.fileno(), len(head), size)

    def _resume(self) -> bool:
        """Whether an earlier run's work is there to go on with."""
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not self._partial.is_file():
            return False
        if journal.get("fingerprint") != self._fingerprint:
            self._refuse_other()
            return False
        self._done, self._checksums, self._begun = (journal[name] for name in ("done", "checksums", "begun"))
        self._begun_checksums = journal.get("begun_checksums", {})
        return True

    def _refuse_other(self) -> None:  # noqa: B027  most begin anew
        """What an earlier run has left is of another fingerprint: CheckpointError where it must not be lost."""

    def _write_journal(self) -> None:
        content = {"fingerprint": self._fingerprint, "done": self._done, "checksums": self._checksums}
        begun = {"begun": self._begun, "begun_checksums": self._begun_checksums}
        write_json(self._journal, {**content, **begun}, indent=None)

    def _no_space(self, error: Exception) -> CheckpointError:
        # torch's own writer has a RuntimeError for a full disk
        if isinstance(error, WriteError):
            return CheckpointError(f"{self.target}: it cannot be written: {error.reason}")
        reason = getattr(error, "strerror", None) or f"is the disk full? {one_line(error)}"
        return CheckpointError(f"{self.target}: it cannot be written: {reason}")


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write_all(file: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(file, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written
