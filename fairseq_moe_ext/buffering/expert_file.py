"""A layer's experts in a safetensors file: written once, one tensor at a time, and read at their offsets.

Legend: H = local experts; parts = an expert's tensors as its format packs them, of floats four in the order of
EXPERT_KEYS, in a quantised one a block.
The format: 8 bytes with the header's length, the header as JSON, the tensors' bytes. Its metadata holds a fingerprint
of what the file was made of and a CRC-32 per tensor, checked at its first read; that the file is as it was, at each.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_ext.atomic_file import WriteError, new_file
from fairseq_moe_ext.bounded_json import check_regular, parse_json
from fairseq_moe_ext.buffering.file_reading import read_at
from fairseq_moe_ext.buffering.store import StoreError
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.safetensors_header import CHECKSUMS, DTYPES, METADATA, header_bytes
from fairseq_moe_ext.safetensors_header import layout as header_layout

logger = logging.getLogger("fairseq_moe_ext")

_FLOAT_KEYS = tuple(EXPERT_KEYS.values())
_DIGITS = 16  # of a fingerprint in a file's name


def store_file(folder: Path, name: str, fingerprint: str) -> Path:
    """Where the experts called `name` with the values of `fingerprint` lie: no other values have that file."""
    return folder / f"{name}.{fingerprint[:_DIGITS]}.safetensors"


def other_files(folder: Path, name: str, file: Path) -> list[Path]:
    """What lies beside `file` of experts with the same name: of other values, or left by a process that was killed."""
    hexadecimal = rf"\.[0-9a-f]{{{_DIGITS}}}"
    pattern = re.compile(rf"{re.escape(name)}({hexadecimal})?\.safetensors({hexadecimal}\.tmp)?")
    return sorted(found for found in folder.iterdir() if pattern.fullmatch(found.name) and found != file)


def open_or_build(
    path: Path,
    local: Sequence[int],
    weights: Sequence[Sequence[Tensor]],
    fingerprint: str,
    keys: Sequence[str] = _FLOAT_KEYS,
    version: str = "",
) -> ExpertFile:
    """The file at `path` if it holds these experts, else after it was built anew.

    local: H numbers of experts. weights: H experts' parts. fingerprint: equal for equal values of all of them; of
    quantised ones for equal originals, whose codes `version` decides. keys: of an expert's parts in the file.
    StoreError where the file is not theirs and cannot be written.
    """
    layout = _layout(local, weights, fingerprint, keys, version)
    try:
        found = ExpertFile(path, layout)
        logger.info("experts are read from %s", path)
        return found
    except FileNotFoundError:
        stale = ""
    except (StoreError, OSError) as error:
        stale = str(error)
    try:
        _build(path, weights, layout)
    except OSError as error:
        if (found := _built_meanwhile(path, layout)) is not None:
            return found
        reason = error.reason if isinstance(error, WriteError) else error.strerror or error
        raise StoreError(
            f"{path}: the expert store cannot be written: {reason}{stale and f' ({stale})'}; --expert-store-dir puts "
            "it into another folder"
        ) from error
    logger.info("experts were written to %s%s", path, stale and f", built anew: {stale}")
    return ExpertFile(path, layout)


def _built_meanwhile(path: Path, layout: dict) -> ExpertFile | None:
    """By another process; two on one disk may lack the room that one has."""
    try:
        found = ExpertFile(path, layout)
    except (StoreError, OSError):
        return None
    logger.info("experts are read from %s, which another process has written", path)
    return found


class ExpertFile:
    """An open file of experts, a Source for FileStore; it can be read even when its name is gone."""

    def __init__(self, path: Path, layout: dict):
        self._path = path
        check_regular(path)
        self._file = open(path, "rb")  # noqa: SIM115  stays open with the store
        try:
            self._start, self._checksums = self._check(layout)
        except (StoreError, OSError):
            self._file.close()
            raise
        self._tensors = [(name, entry) for name, entry in layout.items() if name != METADATA]
        self._parts = len({name.partition(".")[2] for name, _ in self._tensors})  # of an expert
        self._verified = [False] * len(self._tensors)
        self._state = self._stat()

    def _check(self, layout: dict) -> tuple[int, list[int]]:
        """Where the tensors' bytes begin, and their checksums; StoreError if this is no file of that layout."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        try:
            if length > size:
                raise ValueError("its header is cut off")
            header = parse_json(self._file.read(length))
            checksums = [int(crc, 16) for crc in header[METADATA].pop(CHECKSUMS).split()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self._path}: not an expert store: {str(error)[:200]}") from error
        tensors = len(layout) - 1
        wanted = 8 + length + max(entry["data_offsets"][1] for name, entry in layout.items() if name != METADATA)
        if size != wanted:
            raise StoreError(f"{self._path}: an expert store of {wanted} bytes must have them, found {size}")
        if header != layout or len(checksums) != tensors:
            raise StoreError(f"{self._path}: an expert store of another checkpoint or other experts")
        return 8 + length, checksums

    def dtype(self, part: int) -> torch.dtype:
        """As `Source` has it."""
        return DTYPES[self._tensors[part][1]["dtype"]]

    def fill(self, expert: int, part: int, target: Tensor) -> int:
        """As `Source` has it; StoreError where the file is damaged, was changed or cannot be read."""
        number = expert * self._parts + part
        name, entry = self._tensors[number]
        direct = target.dtype == self.dtype(part) and target.is_contiguous() and target.device.type == "cpu"
        values = target if direct else torch.empty(entry["shape"], dtype=self.dtype(part))
        first, end = entry["data_offsets"]
        try:
            known = self._verified[number]
            crc = read_at(self._file.fileno(), _bytes_of(values), self._start + first, None if known else 0)
            changed = self._stat() != self._state
        except (OSError, EOFError) as error:
            reason = str(error) or "it ends"
            raise StoreError(f"{self._path}: the expert store can no longer be read: {reason}") from error
        if changed or not known and crc != self._checksums[number]:
            what = "was changed while it was in use" if changed else f"is damaged: {name} has another checksum"
            raise StoreError(f"{self._path}: the expert store {what}; delete it, and it is built anew")
        self._verified[number] = True
        if not direct:
            target.copy_(values)
        return end - first

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


def _layout(
    local: Sequence[int], weights: Sequence[Sequence[Tensor]], fingerprint: str, keys: Sequence[str], version: str
) -> dict:
    """The file's header but for the checksums."""
    metadata = {"format": "pt", "fingerprint": fingerprint, **({"version": version} if version else {})}
    tensors = (
        (f"{expert}.{key}", part.dtype, part.shape)
        for expert, parts in zip(local, weights, strict=True)
        for key, part in zip(keys, parts, strict=True)
    )
    return header_layout(tensors, metadata)


def _build(path: Path, weights: Sequence[Sequence[Tensor]], layout: dict) -> None:
    """OSError where that fails, and nothing is left behind; of several processes at once the last one's file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [part for parts in weights for part in parts]
    needed, free = sum(part.nbytes for part in tensors), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes needed, {free} free")
    checksums = [0] * len(tensors)
    with new_file(path) as file:
        file.write(header_bytes(layout, checksums))
        for number, part in enumerate(tensors):
            values = torch.empty(part.shape, dtype=part.dtype)
            values.copy_(part)
            view = _bytes_of(values)
            checksums[number] = zlib.crc32(view)
            file.write(view)
        file.seek(0)
        file.write(header_bytes(layout, checksums))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
