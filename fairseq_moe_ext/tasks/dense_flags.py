"""Which flags need experts, and what they say to a checkpoint that has none."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fairseq_moe_ext.tasks.buffer_flags import BufferFlags
from fairseq_moe_ext.tasks.capacity_flags import CapacityFlags
from fairseq_moe_ext.tasks.flags import MoEFlags

_OF_THE_LAYER = {item.name: item for item in fields(MoEFlags)}
_NEED_EXPERTS = (
    *(item for kind in (CapacityFlags, BufferFlags) for item in fields(kind) if item.name != "_name"),
    # static gating last: some of the others ask for it
    *map(
        _OF_THE_LAYER.__getitem__,
        ("moe_eval_capacity_token_fraction", "moe_kernel", "expert_placement", "moe_gating"),
    ),
)


def check_flags_of_dense(flags: Any, takes_dtype: bool) -> None:
    """ValueError where a flag that experts alone obey is given for a model without any.

    takes_dtype: whether the model is served in `--moe-dtype`; else fairseq's own flags name the dtype.
    """
    for item in _NEED_EXPERTS:
        value = getattr(flags, item.name, item.default)
        if str(value) != str(item.default):
            raise ValueError(f"{_flag(item.name)} needs a model with experts, got {value} with a dense one")
    dtype = getattr(flags, "moe_dtype", None)
    own = "float16" if getattr(flags, "fp16", False) else "float32"
    if not takes_dtype and dtype is not None and str(dtype) != own:
        raise ValueError(f"--moe-dtype needs a model with experts, got {dtype} with a dense one; --fp16 halves it")


def check_dtype_flags(flags: Any) -> None:
    """ValueError where fairseq's flags and `--moe-dtype` name two dtypes, or one that serving would not take."""
    dtype = getattr(flags, "moe_dtype", None)
    for name, wanted in (("fp16", "float16"), ("bf16", "bfloat16")):
        given = [each for each in (name, f"memory_efficient_{name}") if getattr(flags, each, False)]
        if given and dtype is not None and str(dtype) != wanted:
            raise ValueError(f"--moe-dtype must be {wanted} with {_flag(given[0])}, got {dtype}")
        if given and dtype is None and name == "bf16":
            name = _flag(given[0])
            raise ValueError(f"{name} is for training, serving in bfloat16 is --moe-dtype bfloat16, got {name} alone")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
