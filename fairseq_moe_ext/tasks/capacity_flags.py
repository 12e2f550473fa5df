"""The flags of capacity-aware inference, and their checks before anything is loaded."""

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_moe_ext.gating.capacity import CAPACITY_SCOPES, DROP_METRICS, OVERFLOWS, CapacityRules
from fairseq_moe_ext.gating.limit import CAPACITY_PHASES
from fairseq_moe_ext.serving.expert_share import CapacitySettings

logger = logging.getLogger("fairseq_moe_ext")

RESIDENT = "resident"


@dataclass
class CapacityFlags(FairseqDataclass):
    """How many assignments an expert takes, and what becomes of the rest."""

    moe_capacity_factor: Optional[float] = field(
        default=None, metadata={"help": "an expert takes this many times the mean load; default: no capacity"}
    )
    moe_overflow: ChoiceEnum(OVERFLOWS) = field(
        default="drop",
        metadata={"help": "the overflow is dropped, chooses again, or chooses among the experts of its own rank"},
    )
    moe_drop_metric: ChoiceEnum(DROP_METRICS) = field(
        default="score", metadata={"help": "who stays: the highest gate probability, the first tokens, the last"}
    )
    moe_capacity_scope: ChoiceEnum(CAPACITY_SCOPES) = field(
        default="expert", metadata={"help": "the capacity is each expert's, or the sum of a rank's"}
    )
    moe_capacity_phases: ChoiceEnum(CAPACITY_PHASES) = field(
        default="all", metadata={"help": "prefill: decode steps have no capacity"}
    )
    moe_renormalize_after_drop: bool = field(
        default=False, metadata={"help": "scale a token's remaining weights to the sum that they had"}
    )
    moe_virtual_ranks: Optional[int] = field(
        default=None, metadata={"help": "one process: count the capacity as so many ranks would"}
    )
    moe_reroute_prefer: Optional[ChoiceEnum([RESIDENT])] = field(
        default=None, metadata={"help": "overflow goes to the experts first that are in the buffer"}
    )


def check_capacity_flags(flags: Any, ranks: int = 1) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments, of which so many ranks serve."""
    for name, known in (
        ("moe_overflow", OVERFLOWS),
        ("moe_drop_metric", DROP_METRICS),
        ("moe_capacity_scope", CAPACITY_SCOPES),
        ("moe_capacity_phases", CAPACITY_PHASES),
    ):
        value = str(getattr(flags, name, known[0]))
        if value not in known:
            raise ValueError(f"{_flag(name)} must be one of {', '.join(known)}, got {value!r}")
    given = {
        _flag(item.name): getattr(flags, item.name)
        for item in fields(CapacityFlags)
        if item.name.startswith("moe_") and getattr(flags, item.name, item.default) != item.default
    }
    if not given:
        return
    name, value = next(iter(given.items()))
    if str(getattr(flags, "moe_gating", "dynamic")) == "static":
        raise ValueError(
            f"{name} must go with --moe-gating dynamic, got {value} with static gating, whose capacity is "
            "--moe-eval-capacity-token-fraction"
        )
    factor, virtual = getattr(flags, "moe_capacity_factor", None), getattr(flags, "moe_virtual_ranks", None)
    if factor is None:
        raise ValueError(f"{name} needs --moe-capacity-factor, got {value} without it")
    if not math.isfinite(factor) or factor <= 0:
        raise ValueError(f"--moe-capacity-factor must be a number above 0, got {factor}")
    if virtual is not None:
        if virtual < 1:
            raise ValueError(f"--moe-virtual-ranks must be at least 1, got {virtual}")
        if ranks > 1:
            raise ValueError(f"--moe-virtual-ranks must be of one process, got {virtual} with {ranks} ranks")
    if getattr(flags, "moe_reroute_prefer", None) is not None:
        if str(flags.moe_overflow) == "drop":
            raise ValueError("--moe-reroute-prefer needs --moe-overflow reroute or expand, got drop")
        if getattr(flags, "expert_buffer_size", None) is None:
            raise ValueError("--moe-reroute-prefer resident needs --expert-buffer-size, got none")


def capacity_settings(flags: Any) -> CapacitySettings | None:
    """The checked flags; None without a capacity."""
    if flags.moe_capacity_factor is None:
        return None
    rules = CapacityRules(
        float(flags.moe_capacity_factor),
        str(flags.moe_overflow),
        str(flags.moe_drop_metric),
        str(flags.moe_capacity_scope),
        bool(flags.moe_renormalize_after_drop),
    )
    return CapacitySettings(
        rules, str(flags.moe_capacity_phases), flags.moe_virtual_ranks or 1, flags.moe_reroute_prefer is not None
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
