"""Random access to the tensors' bytes in a file as `torch.save` writes it: a zip archive of uncompressed records.

PyTorch reads such a file without looking at its checksums; here every byte that is used is checked (records.py).
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from fairseq_moe_ext.checkpoints.archive_rules import check_entries, check_list
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.open_files import Descriptor
from fairseq_moe_ext.checkpoints.records import CHUNK, Record, Records

MAGIC = b"PK\x03\x04"
_HEADER = 30  # bytes of a local file header before its name


class RecordFile(Records):
    """A checkpoint file in use; its small records are checked at once, tensors when they are read, by any thread."""

    def __init__(self, path: Path, loading: Loading):
        super().__init__(path, loading)
        opened = self._file.descriptor()
        try:
            size = opened.state()[0]
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
        while record.read(CHUNK):
            pass
