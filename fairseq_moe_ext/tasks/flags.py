"""The plugin's flags: those of no other file here, all together, and their checks before anything is loaded."""

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from fairseq_moe_ext.atomic_file import WriteError, check_writable
from fairseq_moe_ext.balancing.placement import load_placement
from fairseq_moe_ext.gating.slots import GATINGS
from fairseq_moe_ext.kernels.choice import KERNELS
from fairseq_moe_ext.kernels.cpu_kernel import check_kernel
from fairseq_moe_ext.kernels.crossing import check_rows
from fairseq_moe_ext.option_names import as_option
from fairseq_moe_ext.ranks.group import Rank
from fairseq_moe_ext.tasks.buffer_flags import BufferFlags, check_buffer_flags
from fairseq_moe_ext.tasks.capacity_flags import CapacityFlags, check_capacity_flags
from fairseq_moe_ext.tasks.choice_flags import ChoiceFlags, check_choice_flags
from fairseq_moe_ext.tasks.flag import check_values, flag
from fairseq_moe_ext.tasks.keep_flags import KeepFlags, check_keep_flags
from fairseq_moe_ext.tasks.weight_flags import WeightFlags, check_weight_flags
from fairseq_moe_ext.torch_versions import has_grouped_mm

OUTPUTS = ("moe_report", "moe_trace", "moe_record")  # files that serving writes
DTYPES = ("float32", "float16", "bfloat16")


def _check_fraction(fraction: float) -> None:
    if not math.isfinite(fraction):
        raise ValueError(f"must be a finite number, got {fraction}")


def _check_kernel(kernel: str) -> None:
    if kernel == "triton" and find_spec("triton") is None:
        raise ValueError("triton needs the package triton, which is not installed")
    if kernel == "grouped-mm" and not has_grouped_mm():
        raise ValueError(
            f"grouped-mm needs torch.nn.functional.grouped_mm, which PyTorch {torch.__version__} does not have"
        )


@dataclass
class MoEFlags(CapacityFlags, BufferFlags, KeepFlags, ChoiceFlags, WeightFlags):
    """How a Mixture-of-Experts checkpoint is served."""

    moe_gating: ChoiceEnum(GATINGS) = flag(
        "dynamic", "dynamic: no capacity, no placeholders; static: upstream's capacity and dense mask", training=True
    )
    moe_eval_capacity_token_fraction: Optional[float] = flag(
        None,
        "static gating: slots per expert as a share of a batch's tokens; default: the checkpoint's",
        check=_check_fraction,
        training=True,
    )
    moe_dtype: Optional[ChoiceEnum(DTYPES)] = flag(
        None, "dtype to serve in; default: float32, or float16 under --fp16", experts=False
    )
    moe_kernel: ChoiceEnum(KERNELS) = flag(
        "auto", "what computes the experts; auto: by what the device can do", check=_check_kernel
    )
    moe_report: Optional[str] = flag(None, "write what was served to this file, as JSON", experts=False)
    moe_trace: Optional[str] = flag(None, "record the routing to this file (.npz)", experts=False)
    moe_record: Optional[str] = flag(
        None,
        "record the experts' inputs, the first choices by language and a sample of gate inputs to this file (.npz)",
    )
    expert_placement: Optional[str] = flag(
        None, "several ranks: which ranks hold which expert (.json); default: experts in rising number"
    )
    continuous_batching: bool = flag(
        False, "waiting sentences take the place of finished ones in the decoder", experts=False
    )
    moe_debug: bool = flag(
        False, "errors of the plugin's own come with a traceback, not as a sentence", experts=False, training=True
    )
    is_moe: bool = flag(
        False,
        "accepted for the sake of upstream's scripts; the checkpoint tells by itself",
        experts=False,
        training=True,
    )


@dataclass
class FairseqsFlags(FairseqDataclass):
    """Flags of fairseq's commands that the tasks and the checks look at, too."""

    skip_invalid_size_inputs_valid_test: bool = II("dataset.skip_invalid_size_inputs_valid_test")
    valid_subset: str = II("dataset.valid_subset")
    num_shards: int = II("dataset.num_shards")
    shard_id: int = II("dataset.shard_id")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    bf16: bool = II("common.bf16")
    memory_efficient_bf16: bool = II("common.memory_efficient_bf16")


def check_flags(flags: Any, rank: Rank | None = None) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments.

    rank: of those that serve; None: of a command, as torchrun's environment has it.
    """
    rank = Rank.of_command() if rank is None else rank
    check_values(MoEFlags, flags)
    check_kernel()
    check_rows()
    placement = getattr(flags, "expert_placement", None)
    if placement is not None:
        _check_placement(placement, getattr(flags, "moe_virtual_ranks", None) or rank.world_size)
    _check_outputs(flags, writes=rank.rank == 0)  # rank 0 writes for all
    _check_record(flags)
    check_buffer_flags(flags)
    check_weight_flags(flags)
    check_keep_flags(flags)
    check_choice_flags(flags)
    check_capacity_flags(flags, rank.world_size)
    if getattr(flags, "continuous_batching", False):
        _check_continuous_batching(flags, rank.world_size)


def check_static_capacity(flags: Any) -> None:
    """ValueError where serving under `flags` has no use for `--moe-eval-capacity-token-fraction`; a training has."""
    fraction = getattr(flags, "moe_eval_capacity_token_fraction", None)
    if fraction is not None and str(flags.moe_gating) == "dynamic":
        raise ValueError(
            f"--moe-eval-capacity-token-fraction needs --moe-gating static, got {fraction} with dynamic gating, which "
            "has no capacity"
        )


def _check_continuous_batching(flags: Any, ranks: int) -> None:
    """A sentence's result must not depend on who is decoded beside it."""
    rule = "--continuous-batching needs results that do not depend on a sentence's batch"
    fraction = getattr(flags, "moe_eval_capacity_token_fraction", None)
    if str(getattr(flags, "moe_gating", "dynamic")) == "static" and (fraction is None or fraction < 1):
        got = "the checkpoint's" if fraction is None else fraction
        raise ValueError(f"{rule}: --moe-gating static must have --moe-eval-capacity-token-fraction 1.0, got {got}")
    factor = getattr(flags, "moe_capacity_factor", None)
    if factor is not None and str(flags.moe_capacity_phases) != "prefill":
        raise ValueError(f"{rule}: --moe-capacity-factor {factor} must have --moe-capacity-phases prefill, got all")
    if ranks > 1:
        raise ValueError(f"--continuous-batching is for one process, got {ranks} ranks")


def _check_placement(path: str, ranks: int) -> None:
    try:
        found = load_placement(path).world_size
    except ValueError as error:
        raise ValueError(f"--expert-placement {error}") from error
    if found != ranks:
        raise ValueError(f"--expert-placement {path} must be for the ranks that serve, {ranks}, got {found}")


def _check_record(flags: Any) -> None:
    path = getattr(flags, "moe_record", None)
    if path is not None and str(getattr(flags, "moe_gating", "dynamic")) == "static":
        raise ValueError(
            f"--moe-record must go with --moe-gating dynamic, got {path} with static gating, whose empty slots would "
            "count as the experts' inputs"
        )


def _check_outputs(flags: Any, writes: bool) -> None:
    files = {name: path for name in OUTPUTS if (path := getattr(flags, name, None)) is not None}
    for first, second in combinations(files, 2):
        path = files[first]
        if os.path.realpath(path) == os.path.realpath(files[second]) and not Path(path).is_char_device():
            raise ValueError(f"{as_option(first)} and {as_option(second)} must name two files, got {path} twice")
    for name, path in files.items():
        if writes:
            _check_writable(as_option(name), Path(path))


def _check_writable(flag: str, path: Path) -> None:
    folder = path.parent
    if os.path.isdir(path):
        raise ValueError(f"{flag} must name a file, got the folder {path}")
    if not os.path.isdir(folder):
        raise ValueError(f"{flag} must name a file in an existing folder, got {path}")
    try:
        check_writable(path, flag)
    except WriteError as error:
        raise ValueError(str(error)) from error
