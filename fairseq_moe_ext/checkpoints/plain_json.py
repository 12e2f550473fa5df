"""A checkpoint's configuration as JSON can say it; what it cannot say is left out."""

from __future__ import annotations

import math
from argparse import Namespace
from enum import Enum
from typing import Any

import numpy as np

from fairseq_moe_ext.checkpoints.plain_config import ConfigError, plain
from fairseq_moe_ext.checkpoints.rank_files import updates

_DEPTH = 50
_NOTHING = object()  # of a value that is left out


def json_state(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state but for its model: a Namespace is an object, an enum's member its value.

    Of the training's course the number of updates is kept.
    """
    number = updates(state)
    return {
        "args": _object_or_none(state.get("args")),
        "cfg": _object_or_none(state.get("cfg")),
        "extra_state": _object_or_none(state.get("extra_state")) or {},
        "optimizer_history": [] if number is None else [{"num_updates": number}],
        "task_state": {},
    }


def _object_or_none(value: Any) -> dict[str, Any] | None:
    try:
        found = as_json(plain(value))
    except ConfigError:  # no configuration: the loader has refused those
        return None
    return found if isinstance(found, dict) else None


def as_json(value: Any, depth: int = _DEPTH) -> Any:
    """The value, or what of it JSON can say; None where that is nothing."""
    found = _as_json(value, depth)
    return None if found is _NOTHING else found


def _as_json(value: Any, depth: int) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Namespace):
        value = vars(value)
    if value is None or isinstance(value, str | bool | int) or isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, dict) and depth:
        items = {str(name): _as_json(item, depth - 1) for name, item in value.items() if isinstance(name, str | int)}
        return {name: item for name, item in items.items() if item is not _NOTHING}
    if isinstance(value, list | tuple) and depth:
        return [item for item in (_as_json(each, depth - 1) for each in value) if item is not _NOTHING]
    return _NOTHING
