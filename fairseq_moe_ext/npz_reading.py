"""A .npz archive that somebody else may have written: its arrays are looked at before they take any memory."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_LIST = 100_000  # bytes of the archive's list of arrays, where nobody says otherwise


def read_arrays(
    content: bytes, wanted: Callable[[Iterable[str]], Iterable[str]], room: int, kinds: str, most_listed: int = _LIST
) -> dict[str, np.ndarray]:
    """Name -> array, of those of the archive `content` that `wanted` chooses among the names in it.

    room: bytes that they may take together. kinds: of their dtypes, numpy's letters. most_listed: bytes of the list of
    arrays. ValueError where one is not what it must be; zipfile and numpy raise a dozen other types.
    """
    reader: Any = zipfile  # its own names, which the types do not know
    end = reader._EndRecData(io.BytesIO(content))  # as zipfile itself finds it, before it reads the list
    if end is not None and end[reader._ECD_SIZE] > most_listed:
        raise ValueError(f"its list of arrays must take at most {most_listed} bytes, got {end[reader._ECD_SIZE]}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("each of its arrays must stand there once")
        names = [name for name in wanted(members) if name in members]
        size = sum(members[name].file_size for name in names)
        if size > room:
            raise ValueError(f"its arrays must take at most {room:,} bytes, got {size:,}")
        return {name: _array(archive, members[name], kinds) for name in names}


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, kinds: str) -> np.ndarray:
    """One array, whose header must describe as many bytes as the archive says that there are."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename} must be of numpy's format 1.0 or 2.0, got {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        said = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or dtype.kind not in kinds or said != entry.file_size - file.tell():
            raise ValueError(f"{entry.filename} must hold {dtype} {shape} and nothing else, of numbers or names")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def reason_of(error: Exception) -> str:
    """What a damaged file's error says, in one line of bounded length."""
    lines = str(getattr(error, "strerror", None) or error)[:200].splitlines()
    return lines[0] if lines else type(error).__name__
