"""The flags of capacity-aware inference."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_moe_ext.gating.capacity import CAPACITY_SCOPES, DROP_METRICS, OVERFLOWS, CapacityRules
from fairseq_moe_ext.gating.limit import CAPACITY_PHASES
from fairseq_moe_ext.option_names import as_option
from fairseq_moe_ext.serving.expert_share import CapacitySettings
from fairseq_moe_ext.tasks.flag import check_needs, check_values, flag, flags_of, is_given, values_of

RESIDENT = "resident"


def _factor(value: float) -> float:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"must be a number above 0, got {value}")
    return float(value)


def _ranks(value: int) -> int:
    if value < 1:
        raise ValueError(f"must be at least 1, got {value}")
    return value


_of_capacity = partial(flag, needs=("moe_capacity_factor", None))


@dataclass
class CapacityFlags(FairseqDataclass):
    """How many assignments an expert takes, and what becomes of the rest."""

    moe_capacity_factor: Optional[float] = flag(
        None, "an expert takes this many times the mean load; default: no capacity", read=_factor
    )
    moe_overflow: ChoiceEnum(OVERFLOWS) = _of_capacity(
        "drop", "the overflow is dropped, chooses again, or chooses among the experts of its own rank"
    )
    moe_drop_metric: ChoiceEnum(DROP_METRICS) = _of_capacity(
        "score", "who stays: the highest gate probability, the first tokens, the last"
    )
    moe_capacity_scope: ChoiceEnum(CAPACITY_SCOPES) = _of_capacity(
        "expert", "the capacity is each expert's, or the sum of a rank's"
    )
    moe_capacity_phases: ChoiceEnum(CAPACITY_PHASES) = _of_capacity("all", "prefill: decode steps have no capacity")
    moe_renormalize_after_drop: bool = _of_capacity(False, "scale a token's remaining weights to the sum that they had")
    moe_virtual_ranks: Optional[int] = _of_capacity(
        None, "one process: count the capacity as so many ranks would", read=_ranks
    )
    moe_reroute_prefer: Optional[ChoiceEnum([RESIDENT])] = _of_capacity(
        None, "overflow goes to the experts first that are in the buffer"
    )


def check_capacity_flags(flags: Any, ranks: int = 1) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments, of which so many ranks serve."""
    check_values(CapacityFlags, flags)
    given = next((item.name for item, _ in flags_of(CapacityFlags) if is_given(item, flags)), None)
    if given is not None and str(getattr(flags, "moe_gating", "dynamic")) == "static":
        raise ValueError(
            f"{as_option(given)} must go with --moe-gating dynamic, got {getattr(flags, given)} with static gating, "
            "whose capacity is --moe-eval-capacity-token-fraction"
        )
    check_needs(CapacityFlags, flags)
    virtual = getattr(flags, "moe_virtual_ranks", None)
    if virtual is not None and ranks > 1:
        raise ValueError(f"--moe-virtual-ranks must be of one process, got {virtual} with {ranks} ranks")
    if getattr(flags, "moe_reroute_prefer", None) is not None:
        if str(flags.moe_overflow) == "drop":
            raise ValueError("--moe-reroute-prefer needs --moe-overflow reroute or expand, got drop")
        if getattr(flags, "expert_buffer_size", None) is None:
            raise ValueError("--moe-reroute-prefer resident needs --expert-buffer-size, got none")


def capacity_settings(flags: Any) -> CapacitySettings | None:
    """The checked flags; None without a capacity."""
    given = values_of(CapacityFlags, flags)
    if given["moe_capacity_factor"] is None:
        return None
    rules = CapacityRules(
        given["moe_capacity_factor"],
        given["moe_overflow"],
        given["moe_drop_metric"],
        given["moe_capacity_scope"],
        bool(given["moe_renormalize_after_drop"]),
    )
    return CapacitySettings(
        rules,
        given["moe_capacity_phases"],
        given["moe_virtual_ranks"] or 1,
        given["moe_reroute_prefer"] is not None,
    )
