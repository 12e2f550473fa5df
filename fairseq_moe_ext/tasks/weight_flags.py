"""The flags of quantised weights."""

import re
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_moe_ext.checkpoints.loading import ModelState
from fairseq_moe_ext.experts.formats import ALL, DENSE, EXPERTS, FLOAT, FORMATS, QUANTIZED_KERNELS, SCOPES
from fairseq_moe_ext.tasks.flag import check_needs, check_values, flag, values_of


def _rows(text: Any) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", str(text)) or int(text) < 1:
        raise ValueError(f"must be a whole number of rows of at least 1, got {text!r}")
    return int(text)


@dataclass
class WeightFlags(FairseqDataclass):
    """How weights lie in memory while a checkpoint is served."""

    # None: what is said by default and what the user says must differ, since a quantised checkpoint says it, too
    moe_weights: Optional[ChoiceEnum(FORMATS)] = flag(
        None,
        "the experts' weights: floats of the model's dtype, or quantised to int8 or int4 while they are loaded; "
        "default: float, or as a quantised checkpoint has them",
        experts=False,
    )
    moe_weights_scope: Optional[ChoiceEnum(SCOPES)] = flag(
        None,
        "what --moe-weights quantises: the experts alone, or beside them all dense linear layers and embeddings, which "
        "are int8 then in any case; default: experts",
        experts=False,
    )
    moe_report_weight_error: Optional[str] = flag(
        None,
        "with --moe-report and quantised experts: per MoE layer the relative error of their outputs on the run's first "
        "rows, so many, against the checkpoint's floats",
        read=_rows,
        needs=("moe_report", None),
    )


def check_weight_flags(flags: Any) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments."""
    check_values(WeightFlags, flags)
    check_needs(WeightFlags, flags)
    name, rows = weight_format(flags), weight_error_rows(flags)
    if name == FLOAT:
        if rows:
            raise ValueError(f"--moe-report-weight-error needs --moe-weights int8 or int4, got {rows} with {FLOAT}")
        if (scope := values_of(WeightFlags, flags)["moe_weights_scope"]) is not None:
            raise ValueError(f"--moe-weights-scope {scope} needs --moe-weights int8 or int4, got {FLOAT}")
        return
    _check_kernel(flags, f"--moe-weights {name}")
    on_disk = str(getattr(flags, "expert_store", None)) == "disk"
    if on_disk and getattr(flags, "expert_store_dir", None) is None:
        raise ValueError(
            f"--moe-weights {name} with --expert-store disk needs --expert-store-dir, the folder for the quantised "
            "experts, which are written there once (a quantised checkpoint is that store itself, without "
            "--moe-weights); got none"
        )


def _check_kernel(flags: Any, weights: str) -> None:
    kernel = str(getattr(flags, "moe_kernel", "auto"))
    if kernel not in QUANTIZED_KERNELS:
        raise ValueError(
            f"--moe-kernel must be {' or '.join(QUANTIZED_KERNELS)} with {weights}, got {kernel}, which reads no "
            "quantised experts"
        )


def check_weights_of_dense(flags: Any) -> None:
    """ValueError where a model without experts cannot obey: its layers are quantised to int8, or not at all."""
    name = weight_format(flags)
    if name != FLOAT and not quantizes_all(flags):
        raise ValueError(
            f"--moe-weights {name} needs --moe-weights-scope {ALL} with a dense model, got {EXPERTS}"
        )
    if name not in (FLOAT, DENSE):
        raise ValueError(
            f"--moe-weights must be {DENSE} with a dense model, whose layers are quantised to no fewer bits, got {name}"
        )


def weight_format(flags: Any) -> str:
    """One of FORMATS, as the flags say it."""
    return values_of(WeightFlags, flags)["moe_weights"] or FLOAT


def quantizes_all(flags: Any) -> bool:
    """Whether dense layers are quantised, too."""
    return values_of(WeightFlags, flags)["moe_weights_scope"] == ALL


def weight_error_rows(flags: Any) -> int:
    """On how many of each layer's rows the report compares its experts with floats; 0: it does not."""
    return values_of(WeightFlags, flags)["moe_report_weight_error"] or 0


def check_weights_of_file(weights: str | None, scope: str | None, path: str, experts: str, dense: str) -> None:
    """ValueError where what the user says, None for nothing, is not what the quantised checkpoint at `path` has."""
    rule = f"or be left out: {path} is a quantised checkpoint, which says itself what it is"
    if weights not in (None, experts):
        raise ValueError(f"--moe-weights must be {experts} {rule}, got {weights}")
    if scope not in (None, wanted := ALL if dense == DENSE else EXPERTS):
        raise ValueError(f"--moe-weights-scope must be {wanted} {rule}, with dense layers in {dense}, got {scope}")


@dataclass(frozen=True)
class ServedWeights:
    """How a model's weights are to lie: experts in one of FORMATS; int8_dense: whether dense layers are int8."""

    experts: str
    int8_dense: bool


def served_weights(flags: Any, state: ModelState | None) -> ServedWeights:
    """As the flags say; a quantised checkpoint says itself what it is.

    state: the checkpoint's. ValueError naming flag, rule and value where a flag says something else than the file.
    """
    if state is None or state.about is None:
        return ServedWeights(weight_format(flags), quantizes_all(flags))
    about, given = state.about, values_of(WeightFlags, flags)
    path = state.loading.path
    check_weights_of_file(given["moe_weights"], given["moe_weights_scope"], path, about.experts, about.dense)
    if rows := weight_error_rows(flags):
        raise ValueError(f"--moe-report-weight-error needs the originals, which {path} does not have, got {rows}")
    _check_kernel(flags, f"experts in {about.experts}")
    return ServedWeights(about.experts, about.dense == DENSE)
