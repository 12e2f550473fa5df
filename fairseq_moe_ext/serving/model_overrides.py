"""What `--model-overrides` says: fields of the checkpoint, but none that a flag of this plugin stands above."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from fairseq_moe_ext.option_names import as_option
from fairseq_moe_ext.serving.keyword_options import FLAGS

_OF_CHECKPOINTS = ("moe_eval_capacity_token_fraction",)  # what a flag says only where it is given


def read_overrides(given: Any, name: str) -> dict[str, Any]:
    """Field -> value. ValueError where it is no mapping, or names what takes its value from a flag alone.

    given: a mapping, its text, or nothing. name: of the option, as the user writes it.
    """
    overrides = given or {}
    if isinstance(overrides, str):
        try:
            overrides = ast.literal_eval(overrides)
        except (ValueError, SyntaxError):
            pass
    if not isinstance(overrides, Mapping):
        raise ValueError(f"{name} must be a mapping of the checkpoint's fields, got {overrides!r}")
    for field, value in overrides.items():
        if field in FLAGS and field not in _OF_CHECKPOINTS:
            flag = as_option(field) if name.startswith("--") else field
            raise ValueError(f"{name} must leave {field} to {flag}, got {value!r}")
    return dict(overrides)
