"""The one definition of a size in bytes as text, for every flag and script: as memory is sold, in powers of 1024."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def bytes_in_words(size: int) -> str:
    """With one decimal.

    >>> bytes_in_words(27_486_060_544), bytes_in_words(1_180_000)
    ('25.6 GiB', '1.1 MiB')
    """
    power, unit = (30, "GiB") if size >= 2**30 else (20, "MiB")
    return f"{size / 2**power:.1f} {unit}"


def parse_bytes(text: str) -> int:
    """Whole bytes; ValueError where `text` is no size.

    >>> parse_bytes("64G") == parse_bytes("64GB") == parse_bytes("64GiB") == 64 * 2**30
    True
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"must be a size as 64G or 500M (powers of 1024), got {text!r}")
    return int(float(match.group(1)) * 1024 ** _POWERS[match.group(2).upper()])
