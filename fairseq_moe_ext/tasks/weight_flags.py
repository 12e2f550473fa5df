"""The flags of quantised weights."""

from dataclasses import dataclass
from typing import Any

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_moe_ext.experts.formats import ALL, EXPERTS, FLOAT, FORMATS, QUANTIZED_KERNELS, SCOPES
from fairseq_moe_ext.tasks.flag import check_values, flag, values_of


@dataclass
class WeightFlags(FairseqDataclass):
    """How weights lie in memory while a checkpoint is served."""

    moe_weights: ChoiceEnum(FORMATS) = flag(
        FLOAT, "the experts' weights: floats of the model's dtype, or quantised to int8 or int4 while they are loaded"
    )
    moe_weights_scope: ChoiceEnum(SCOPES) = flag(
        EXPERTS,
        "what --moe-weights quantises: the experts alone, or beside them all dense linear layers and embeddings, which "
        "are int8 then in any case",
    )


def check_weight_flags(flags: Any) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments."""
    check_values(WeightFlags, flags)
    name = weight_format(flags)
    if name == FLOAT:
        if quantizes_all(flags):
            raise ValueError(f"--moe-weights-scope {ALL} needs --moe-weights int8 or int4, got {FLOAT}")
        return
    kernel = str(getattr(flags, "moe_kernel", "auto"))
    if kernel not in QUANTIZED_KERNELS:
        raise ValueError(
            f"--moe-kernel must be {' or '.join(QUANTIZED_KERNELS)} with --moe-weights {name}, got {kernel}, which "
            "reads no quantised experts"
        )
    on_disk = str(getattr(flags, "expert_store", None)) == "disk"
    if on_disk and getattr(flags, "expert_store_dir", None) is None:
        raise ValueError(
            f"--moe-weights {name} with --expert-store disk needs --expert-store-dir, the folder for the quantised "
            "experts, which are written there once; got none"
        )


def weight_format(flags: Any) -> str:
    """One of FORMATS."""
    return values_of(WeightFlags, flags)["moe_weights"]


def quantizes_all(flags: Any) -> bool:
    """Whether dense layers are quantised, too."""
    return values_of(WeightFlags, flags)["moe_weights_scope"] == ALL
