"""The records of a file, each one tensor's bytes at its place, read with their checksums.

Every record that is used is checked once, since a damaged weight would otherwise be served in silence; from then on the
file must stay as it is, which each read looks at. Reading goes through a
plain file, not a map, whose pages would count as this process's memory for as long as they lie there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_ext.buffering.file_reading import read_at
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.open_files import Descriptor, ReopenedFile

CHUNK = 1 << 20  # stays in the cache between reading and checking


@dataclass
class Record:
    """One tensor storage: where its bytes lie in the file, how many, their CRC-32; verified once that was checked."""

    name: str
    offset: int
    size: int
    crc: int
    verified: bool = False


class Records:
    """A file in use, read by any thread; OSError where it cannot be opened.

    loading: hears of the bytes that were read, and of an error; its files bound how many are open at a time.
    """

    has_checksums = True

    def __init__(self, path: Path, loading: Loading):
        self.path = path
        self.loading = loading
        self._file = ReopenedFile(path, loading.files)

    def read_into(self, target: Tensor, dtype: torch.dtype, record: Record, start: int = 0) -> None:
        """Fill `target`, contiguous, with the record's values of `dtype` from byte `start` on."""
        if target.numel() == 0:
            return
        size = target.numel() * dtype.itemsize
        try:
            if start + size > record.size:
                raise CheckpointError(
                    f"{self.path}: a tensor must lie within record {record.name} of {record.size} bytes, "
                    f"got {start + size}"
                )
            opened = self._file.descriptor()
            if size < record.size and self.has_checksums and not record.verified:
                self._verify(opened, record)
            whole = size == record.size and self.has_checksums and not record.verified
            values = target.detach().view(-1)
            crc = self._read_values(opened, values, dtype, record.offset + start, 0 if whole else None)
            if whole:
                self._check(record, crc)
            else:
                self._file.check_unchanged(opened)
        except CheckpointError as error:
            self.loading.error = error
            raise
        self.loading.count(size)

    def _read_values(
        self, opened: Descriptor, target: Tensor, dtype: torch.dtype, offset: int, crc: int | None
    ) -> int | None:
        """target (n,) -> the checksum of its bytes in the file, after `crc`; None, and no work, where that is None."""
        if target.dtype == dtype and target.device.type == "cpu":
            return self._read(opened, _bytes_of(target), offset, crc)
        # piece by piece, and each call in memory of its own: several threads read at once
        between = torch.empty(min(CHUNK // dtype.itemsize, len(target)), dtype=dtype)
        for piece in target.split(len(between)):
            values = between[: len(piece)]
            crc = self._read(opened, _bytes_of(values), offset, crc)
            piece.copy_(values)
            offset += values.nbytes
        return crc

    def _verify(self, opened: Descriptor, record: Record) -> None:
        buffer, crc = memoryview(bytearray(CHUNK)), 0
        for start in range(0, record.size, CHUNK):
            part = buffer[: min(CHUNK, record.size - start)]
            crc = self._read(opened, part, record.offset + start, crc)
        self._check(record, crc)

    def _check(self, record: Record, crc: int) -> None:
        if crc != record.crc:
            raise CheckpointError(
                f"{self.path}: record {record.name} is damaged: its checksum must be {record.crc:08x}, got {crc:08x}"
            )
        record.verified = True

    def _read(self, opened: Descriptor, view: memoryview, offset: int, crc: int | None) -> int | None:
        try:
            return read_at(opened.number, view, offset, crc)
        except EOFError:
            raise CheckpointError(f"{self.path}: not a readable checkpoint: it ends within a tensor") from None


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())
