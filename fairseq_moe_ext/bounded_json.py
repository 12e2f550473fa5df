"""JSON from a file that may hold anything: of a bounded number of values, and every error in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_VALUES = 1_500_000  # NLLB-200's tokenizer.json has half a million
DEPTH, DIGITS = 100, 300  # transformers writes 10^30 where a length has no bound


def read_json(path: str | os.PathLike, most: int = MOST_VALUES) -> Any:
    """What the file holds; OSError or ValueError, which name no file, where it cannot be read or is no JSON."""
    return parse_json(read_regular(path), most)


def parse_json(content: bytes, most: int = MOST_VALUES) -> Any:
    """What `content` says; ValueError where it is no JSON, has more than `most` values, a name twice in an object, a
    whole number of more than DIGITS digits, or lies deeper than DEPTH.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"not JSON of at most {most:,} values")
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_twins, parse_int=_whole, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("not JSON: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {str(error)[:200]}") from error
    _check_depth(value)
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"an object must have a name once, {twin!r:.80} stands there twice")
    return found


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a whole number must have at most {DIGITS} digits, got {len(text)}")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [item for each in level if isinstance(each, dict | list) for item in _items(each)]
        if not level:
            return
    raise ValueError(f"not JSON of at most {DEPTH} levels")


def _items(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def read_regular(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file; opening anything else might wait for ever or never come to an end. OSError."""
    check_regular(path)
    return Path(path).read_bytes()


def check_regular(path: str | os.PathLike) -> None:
    """OSError unless a regular file is there."""
    os.stat(path)  # its own error where nothing is there
    if not os.path.isfile(path):
        raise OSError(0, "it must be a regular file")
