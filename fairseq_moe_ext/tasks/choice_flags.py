"""The flag of fewer choices per token."""

import math
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass

from fairseq_moe_ext.tasks.flag import check_values, flag, values_of


def _threshold(value: float) -> float:
    if not math.isfinite(value) or not 0 <= value <= 0.5:
        raise ValueError(f"must be a share from 0 to 0.5, got {value}")
    return float(value)


@dataclass
class ChoiceFlags(FairseqDataclass):
    """How many of a token's choices run."""

    moe_second_choice_threshold: Optional[float] = flag(
        None,
        "a token's second expert does not run where its share of the two, g2 / (g1 + g2), is below this; the report "
        "has a histogram of the shares, with 0 that alone; default: both run",
        read=_threshold,
    )


def check_choice_flags(flags: Any) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments."""
    check_values(ChoiceFlags, flags)
    threshold = second_choice_threshold(flags)
    if threshold is not None and str(getattr(flags, "moe_gating", "dynamic")) == "static":
        raise ValueError(
            f"--moe-second-choice-threshold needs --moe-gating dynamic, got {threshold} with static gating, which has "
            "a slot for either choice"
        )


def second_choice_threshold(flags: Any) -> float | None:
    """The checked flag; None: both choices run."""
    return values_of(ChoiceFlags, flags)["moe_second_choice_threshold"]
