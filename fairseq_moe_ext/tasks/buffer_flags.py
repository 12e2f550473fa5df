"""The flags of expert buffering."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY, ORDERS, POLICIES
from fairseq_moe_ext.buffering.expert_profile import KINDS, Languages, check_expert_profile
from fairseq_moe_ext.byte_sizes import parse_bytes
from fairseq_moe_ext.serving.expert_buffer import AUTO, OFF, PREFETCH, SCOPES, STORES, BufferSettings, InBytes
from fairseq_moe_ext.tasks.flag import check_needs, check_values, flag, values_of
from fairseq_moe_ext.tasks.keep_flags import keeps_share


def _size(text: Any) -> int | str | InBytes:
    """A number alone counts experts; one with a unit, bytes."""
    if text == AUTO:
        return text
    try:
        in_bytes = str(text)[-1:].isalpha()
        size = parse_bytes(str(text)) if in_bytes else int(text) if re.fullmatch(r"[0-9]{1,9}", str(text)) else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(
            f"must be a whole number of at least 1, a size with its unit as 20G, 500MB or 120000B, or {AUTO}, "
            f"got {text!r}"
        )
    return InBytes(size) if in_bytes else size


def _bytes(text: Any) -> int | None:
    """None for `auto`."""
    if text == AUTO:
        return None
    try:
        return parse_bytes(str(text))
    except ValueError:
        raise ValueError(f"must be a size as 64G or 500M, or {AUTO}, got {text!r}") from None


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"must be a folder, got the file {path}")


def _check_profile(path: Path) -> None:
    try:
        check_expert_profile(path)
    except ValueError as error:
        raise ValueError(f"must be {KINDS}: {error}") from error


_of_buffer = partial(flag, needs=("expert_buffer_size", None))
_of_disk = partial(flag, needs=("expert_store", "disk"))


@dataclass
class BufferFlags(FairseqDataclass):
    """Which experts lie in device memory while a checkpoint is served."""

    expert_buffer_size: Optional[str] = flag(
        None,
        "experts per MoE layer in device memory; 20G, 500MB: bytes for all layers, shared out among them; `auto`: what "
        "fits; default: all of them",
        read=_size,
    )
    expert_buffer_scope: ChoiceEnum(SCOPES) = _of_buffer("all", "which layers are buffered")
    expert_eviction: ChoiceEnum(tuple(POLICIES)) = _of_buffer(
        DEFAULT_POLICY, "who leaves the buffer: the last or first that came in, the least recently or often used"
    )
    expert_order: ChoiceEnum(ORDERS) = _of_buffer(
        DEFAULT_ORDER, "order of computation; ascending ids with lifo is the paper's pair"
    )
    expert_store: ChoiceEnum(STORES) = _of_buffer("host", "where all experts lie: in main memory, or on disk")
    expert_store_dir: Optional[str] = _of_disk(
        None,
        "build the disk store in this folder; default: the checkpoint itself, or beside it",
        read=Path,
        check=_check_folder,
    )
    expert_host_memory: str = _of_disk(
        AUTO, "main memory between a disk store and a GPU, as 64G or 500M; auto: most of what is free", read=_bytes
    )
    expert_prefetch: ChoiceEnum(PREFETCH) = _of_buffer(
        OFF, "layers: while a layer is computed, experts that the next ones nearly always want are fetched"
    )
    expert_profile: Optional[str] = flag(
        None,
        "a trace (--moe-trace), a profile (fairseq-moe profile) or sets of experts by language: who is resident at the "
        "start, who stays among equals, and how many bytes each layer gets",
        read=Path,
        check=_check_profile,
    )


def check_buffer_flags(flags: Any) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments."""
    check_values(BufferFlags, flags)
    check_needs(BufferFlags, flags)
    profile, buffered = getattr(flags, "expert_profile", None), getattr(flags, "expert_buffer_size", None) is not None
    if profile is None or keeps_share(flags):
        return
    if not buffered:
        raise ValueError(f"--expert-profile needs --expert-buffer-size, got {profile} without it")


def buffer_settings(flags: Any, languages: Languages = Languages()) -> BufferSettings | None:
    """The checked flags; None where all experts are to be resident. languages: of the run."""
    given = values_of(BufferFlags, flags)
    if given["expert_buffer_size"] is None:
        return None
    return BufferSettings(
        size=given["expert_buffer_size"],
        scope=given["expert_buffer_scope"],
        policy=given["expert_eviction"],
        order=given["expert_order"],
        store=given["expert_store"],
        store_dir=given["expert_store_dir"],
        host_memory=given["expert_host_memory"],
        profile=given["expert_profile"],
        prefetch=given["expert_prefetch"],
        languages=languages,
    )
