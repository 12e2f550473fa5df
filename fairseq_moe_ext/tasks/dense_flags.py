"""Which flags need experts, and what they say to a checkpoint that has none."""

from __future__ import annotations

from typing import Any

from fairseq_moe_ext.option_names import as_option
from fairseq_moe_ext.tasks.flag import flags_of, is_given
from fairseq_moe_ext.tasks.flags import MoEFlags
from fairseq_moe_ext.tasks.weight_flags import check_weights_of_dense


def check_flags_of_dense(flags: Any, takes_dtype: bool) -> None:
    """ValueError where a flag that experts alone obey is given for a model without any.

    takes_dtype: whether the model is served in `--moe-dtype`; else fairseq's own flags name the dtype.
    """
    needing = [item for item, rules in flags_of(MoEFlags) if rules.experts and is_given(item, flags)]
    if needing:
        name = min(needing, key=lambda item: item.name == "moe_gating").name  # last: some of the others ask for it
        raise ValueError(f"{as_option(name)} needs a model with experts, got {getattr(flags, name)} with a dense one")
    check_weights_of_dense(flags)
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
            raise ValueError(f"--moe-dtype must be {wanted} with {as_option(given[0])}, got {dtype}")
        if given and dtype is None and name == "bf16":
            name = as_option(given[0])
            raise ValueError(f"{name} is for training, serving in bfloat16 is --moe-dtype bfloat16, got {name} alone")
