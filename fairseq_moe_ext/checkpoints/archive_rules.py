"""What a zip archive must be before its records are read: as `torch.save` writes it, and no larger inside than outside.

PyTorch's own reader opens the same file once more, and looks for names without regard to case. An archive that begins
at the file's first byte and ends with its last one, with its list directly before its end, has one list of records,
whichever reader looks for it.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from fairseq_moe_ext.checkpoints.errors import CheckpointError

_LIST = 2_000_000  # bytes that the list of records may take in any file; besides, a 16th of it


def check_list(file: BinaryIO, size: int, path: Path) -> None:
    """CheckpointError where the list of records is too long, or not the only one; before it is read, as an entry grows
    twentyfold there.

    size: of the file in bytes.
    """
    end = zipfile._EndRecData(file)  # as zipfile itself finds it
    if end is None:
        raise CheckpointError(
            f"{path}: not a readable checkpoint: the end of the archive is missing; did its download break off?"
        )
    if not _is_only_list(file, end):
        raise CheckpointError(f"{path}: not a readable checkpoint: its list of records must end where its end begins")
    room, wanted = _LIST + size // 16, end[zipfile._ECD_SIZE]
    if wanted > room:
        raise CheckpointError(f"{path}: its list of records must take at most {room:,} bytes, got {wanted:,}")


def _is_only_list(file: BinaryIO, end: Sequence) -> bool:
    """Whether all that tells where the list lies tells the same."""
    start = end[zipfile._ECD_LOCATION]
    file.seek(max(start - zipfile.sizeEndCentDir64Locator, 0))
    locator = file.read(zipfile.sizeEndCentDir64Locator)
    if locator.startswith(zipfile.stringEndArchive64Locator):
        start -= len(locator) + zipfile.sizeEndCentDir64
        (told,) = struct.unpack_from("<Q", locator, 8)
        if end[zipfile._ECD_SIGNATURE] != zipfile.stringEndArchive64 or told != start:
            return False
    return end[zipfile._ECD_OFFSET] + end[zipfile._ECD_SIZE] == start


def check_entries(entries: Sequence[zipfile.ZipInfo], comment: bytes, size: int, path: Path) -> None:
    """CheckpointError unless each record stands there once, uncompressed, and all of them fit into the file."""
    names = set()
    for entry in entries:
        name = entry.filename[:200]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(f"{path}: record {name} must be uncompressed, as torch.save leaves it")
        if entry.filename.casefold() in names:
            raise CheckpointError(f"{path}: record {name} must stand there once, whatever its letters' case")
        names.add(entry.filename.casefold())
    wanted = sum(entry.file_size for entry in entries)
    if wanted > size:
        raise CheckpointError(f"{path}: its records of {wanted:,} bytes must lie in the {size:,} of the file")
    if comment or entries and min(entry.header_offset for entry in entries) != 0:
        raise CheckpointError(f"{path}: not a readable checkpoint: the archive must be all of the file")
