"""Bytes of a file into memory that is there already, and their checksum on the way."""

from __future__ import annotations

import os
import zlib

_CHUNK = 1 << 20  # stays in the processor's cache between reading and checking


def read_at(descriptor: int, view: memoryview, offset: int, crc: int | None = 0) -> int | None:
    """Fill `view` from `offset` on; gives CRC-32 of `crc` and these bytes, None (and no work) where `crc` is None.

    A plain read and no map, whose pages would count as this process's memory. EOFError where the file ends before.
    """
    for start in range(0, len(view), _CHUNK):
        part = view[start : start + _CHUNK]
        done = 0
        while done < len(part):
            count = os.preadv(descriptor, [part[done:]], offset + start + done)
            if count == 0:
                raise EOFError
            done += count
        if crc is not None:
            crc = zlib.crc32(part, crc)
    return crc
