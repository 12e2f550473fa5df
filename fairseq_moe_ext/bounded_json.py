"""JSON from a file that may hold anything: of a bounded number of values, and every error in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_VALUES = 1_500_000  # NLLB-200's tokenizer.json has half a million


def read_json(path: str | os.PathLike) -> Any:
    """What the file holds; OSError or ValueError, which name no file, where it cannot be read or is no JSON."""
    return parse_json(read_regular(path))


def parse_json(content: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What `content` says; ValueError where it is no JSON, has too many values or lies too deep.

    pairs: makes what stands for an object of its names and values; default: a dict.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"not JSON of at most {MOST_VALUES:,} values")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("not JSON: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {str(error)[:200]}") from error


def read_regular(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file; opening anything else might wait for ever or never come to an end. OSError."""
    check_regular(path)
    return Path(path).read_bytes()


def check_regular(path: str | os.PathLike) -> None:
    """OSError unless a regular file is there."""
    os.stat(path)  # its own error where nothing is there
    if not os.path.isfile(path):
        raise OSError(0, "it must be a regular file")
