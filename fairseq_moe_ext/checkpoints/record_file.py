"""Random access to the tensors' bytes in a file as `torch.save` writes it: a zip archive of uncompressed records.

PyTorch reads such a file without looking at its checksums; here every byte that is used is checked, since a damaged
weight would otherwise be served in silence. Reading goes through a plain file, not a map, whose pages would count as
this process's memory for as long as they lie there.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_ext.buffering.file_reading import read_at
from fairseq_moe_ext.checkpoints.archive_rules import check_entries, check_list
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.open_files import Descriptor, ReopenedFile

MAGIC = b"PK\x03\x04"
_HEADER = 30  # bytes of a local file header before its name
_CHUNK = 1 << 20  # stays in the cache between reading and checking


@dataclass
class Record:
    """One tensor storage: where its bytes lie in the file, how many, their CRC-32; verified once that was checked."""

    name: str
    offset: int
    size: int
    crc: int
    verified: bool = False


class RecordFile:
    """A checkpoint file in use; its small records are checked at once, tensors when they are read, by any thread.

    loading: hears of the bytes that were read, and of an error; its files bound how many are open at a time.
    """

    def __init__(self, path: Path, loading: Loading):
        self.path = path
        self.loading = loading
        self._file = ReopenedFile(path, loading.files)
        opened = self._file.descriptor()
        try:
            size, _ = opened.state()
            with open(opened.number, "rb", closefd=False) as file:
                check_list(file, size, path)
                archive = zipfile.ZipFile(file)
                entries = archive.infolist()
                check_entries(entries, archive.comment, size, path)
                # torch.serialization.set_crc32_options(False) leaves 0 everywhere
                self.has_checksums = any(entry.CRC for entry in entries)
                for entry in entries:
                    if not _is_tensor(entry) and self.has_checksums:
                        _check_untouched(archive, entry)
            self._check_byte_order(opened, entries)
            self._check_apart(opened, entries, size)
            records = (self._locate(opened, entry) for entry in filter(_is_tensor, entries))
            self._records = {record.offset: record for record in records}
            self.tensor_bytes = sum(record.size for record in self._records.values())
            described = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
            self._pickle = self._locate(opened, described[0]) if described else None
        except CheckpointError:
            raise
        except Exception as error:  # zipfile raises a dozen types at damaged archives
            raise CheckpointError(f"{path}: not a readable checkpoint: {one_line(error)}") from error

    def pickle(self) -> bytes:
        """The record that describes the content, b"" where there is none."""
        if self._pickle is None:
            return b""
        return os.pread(self._file.descriptor().number, self._pickle.size, self._pickle.offset)

    def record_at(self, offset: int, size: int) -> Record:
        """The record of a storage of `size` bytes at `offset`."""
        record = self._records.get(offset)
        if record is None or record.size != size:
            found = "none" if record is None else f"{record.size} bytes"
            raise CheckpointError(
                f"{self.path}: not a readable checkpoint: a tensor of {size} bytes must lie at {offset}, found {found}"
            )
        return record

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
            crc = self._read_values(opened, target.detach().view(-1), dtype, record.offset + start)
            if size == record.size and self.has_checksums:
                self._check(record, crc)
            else:  # a part of a record has no checksum of its own
                self._file.check_unchanged(opened)
        except CheckpointError as error:
            self.loading.error = error
            raise
        self.loading.count(size)

    def _read_values(self, opened: Descriptor, target: Tensor, dtype: torch.dtype, offset: int) -> int:
        """target (n,) -> the checksum of its bytes in the file."""
        if target.dtype == dtype and target.device.type == "cpu":
            return self._read(opened, _bytes_of(target), offset)
        # piece by piece, and each call in memory of its own: several threads read at once
        between, crc = torch.empty(min(_CHUNK // dtype.itemsize, len(target)), dtype=dtype), 0
        for piece in target.split(len(between)):
            values = between[: len(piece)]
            crc = self._read(opened, _bytes_of(values), offset, crc)
            piece.copy_(values)
            offset += values.nbytes
        return crc

    def _verify(self, opened: Descriptor, record: Record) -> None:
        buffer, crc = memoryview(bytearray(_CHUNK)), 0
        for start in range(0, record.size, _CHUNK):
            part = buffer[: min(_CHUNK, record.size - start)]
            crc = self._read(opened, part, record.offset + start, crc)
        self._check(record, crc)

    def _check(self, record: Record, crc: int) -> None:
        if crc != record.crc:
            raise CheckpointError(
                f"{self.path}: record {record.name} is damaged: its checksum must be {record.crc:08x}, got {crc:08x}"
            )
        record.verified = True

    def _read(self, opened: Descriptor, view: memoryview, offset: int, crc: int = 0) -> int:
        try:
            return read_at(opened.number, view, offset, crc if self.has_checksums else None)
        except EOFError:
            raise CheckpointError(f"{self.path}: not a readable checkpoint: it ends within a tensor") from None

    def _locate(self, opened: Descriptor, entry: zipfile.ZipInfo) -> Record:
        header = os.pread(opened.number, _HEADER, entry.header_offset)
        if header[:4] != MAGIC or len(header) < _HEADER:
            raise CheckpointError(f"{self.path}: not a readable checkpoint: no record at {entry.header_offset}")
        name_length, extra_length = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        offset = entry.header_offset + _HEADER + name_length + extra_length
        return Record(entry.filename, offset, entry.file_size, entry.CRC)

    def _check_apart(self, opened: Descriptor, entries: list[zipfile.ZipInfo], size: int) -> None:
        """A record that a damaged header puts into another one would be that one's values, with a right checksum."""
        entries = sorted(entries, key=lambda entry: entry.header_offset)
        ends = [*(entry.header_offset for entry in entries[1:]), size]
        for entry, end in zip(entries, ends, strict=True):
            record = self._locate(opened, entry)
            if record.offset + record.size > end:
                raise CheckpointError(
                    f"{self.path}: not a readable checkpoint: record {entry.filename[:200]} must end before the next "
                    f"one at {end}, got {record.offset + record.size}"
                )

    def _check_byte_order(self, opened: Descriptor, entries: list[zipfile.ZipInfo]) -> None:
        for entry in entries:
            if entry.filename.endswith("/byteorder"):
                record = self._locate(opened, entry)
                order = os.pread(opened.number, min(record.size, 20), record.offset)
                if order != b"little":
                    raise CheckpointError(f"{self.path}: its byte order must be little, got {order!r}")


def _is_tensor(entry: zipfile.ZipInfo) -> bool:
    parts = entry.filename.split("/")
    return len(parts) == 3 and parts[1] == "data"


def _check_untouched(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """The checksum of a record that is no tensor, a piece at a time: zipfile compares it at the end."""
    with archive.open(entry) as record:
        while record.read(_CHUNK):
            pass


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())
