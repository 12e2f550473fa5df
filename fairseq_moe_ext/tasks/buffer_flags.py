"""The flags of expert buffering, and their checks before anything is loaded."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY, ORDERS, POLICIES
from fairseq_moe_ext.byte_sizes import parse_bytes
from fairseq_moe_ext.serving.expert_buffer import AUTO, SCOPES, STORES, BufferSettings
from fairseq_moe_ext.trace import load_trace


@dataclass
class BufferFlags(FairseqDataclass):
    """Which experts lie in device memory while a checkpoint is served."""

    expert_buffer_size: Optional[str] = field(
        default=None,
        metadata={"help": "experts per MoE layer in device memory, or `auto`: what fits; default: all of them"},
    )
    expert_buffer_scope: ChoiceEnum(SCOPES) = field(default="all", metadata={"help": "which layers are buffered"})
    expert_eviction: ChoiceEnum(tuple(POLICIES)) = field(
        default=DEFAULT_POLICY,
        metadata={"help": "who leaves the buffer: the last or first that came in, the least recently or often used"},
    )
    expert_order: ChoiceEnum(ORDERS) = field(
        default=DEFAULT_ORDER, metadata={"help": "order of computation; ascending ids with lifo is the paper's pair"}
    )
    expert_store: ChoiceEnum(STORES) = field(
        default="host", metadata={"help": "where all experts lie: in main memory, or on disk"}
    )
    expert_store_dir: Optional[str] = field(
        default=None,
        metadata={"help": "build the disk store in this folder; default: the checkpoint itself, or beside it"},
    )
    expert_host_memory: str = field(
        default=AUTO,
        metadata={"help": "main memory between a disk store and a GPU, as 64G or 500M; auto: most of what is free"},
    )
    expert_profile: Optional[str] = field(
        default=None, metadata={"help": "a trace (--moe-trace) whose hottest experts are resident at the start"}
    )


def check_buffer_flags(flags: Any) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments."""
    for name, known in (
        ("expert_buffer_scope", SCOPES),
        ("expert_eviction", tuple(POLICIES)),
        ("expert_order", ORDERS),
        ("expert_store", STORES),
    ):
        value = str(getattr(flags, name, known[0]))
        if value not in known:
            raise ValueError(f"{_flag(name)} must be one of {', '.join(known)}, got {value!r}")
    _size(getattr(flags, "expert_buffer_size", None))
    _bytes(getattr(flags, "expert_host_memory", AUTO))
    folder = getattr(flags, "expert_store_dir", None)
    if str(getattr(flags, "expert_store", "host")) != "disk":
        for name, without in (("expert_store_dir", None), ("expert_host_memory", AUTO)):
            if (value := getattr(flags, name, without)) != without:
                raise ValueError(f"{_flag(name)} needs --expert-store disk, got {value} without it")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"--expert-store-dir must be a folder, got the file {folder}")
    if getattr(flags, "expert_profile", None) is not None:
        try:
            load_trace(flags.expert_profile)
        except ValueError as error:
            raise ValueError(f"--expert-profile must be a trace that --moe-trace wrote: {error}") from error
    if getattr(flags, "expert_buffer_size", None) is None:
        for item in fields(BufferFlags):
            value = getattr(flags, item.name, item.default)
            if item.name.startswith("expert_") and str(value) != str(item.default):
                raise ValueError(f"{_flag(item.name)} needs --expert-buffer-size, got {value} without it")


def buffer_settings(flags: Any) -> BufferSettings | None:
    """The checked flags; None where all experts are to be resident."""
    if flags.expert_buffer_size is None:
        return None
    return BufferSettings(
        size=_size(flags.expert_buffer_size),
        scope=str(flags.expert_buffer_scope),
        policy=str(flags.expert_eviction),
        order=str(flags.expert_order),
        store=str(flags.expert_store),
        store_dir=None if flags.expert_store_dir is None else Path(flags.expert_store_dir),
        host_memory=_bytes(flags.expert_host_memory),
        profile=None if flags.expert_profile is None else Path(flags.expert_profile),
    )


def _size(text: Any) -> int | str | None:
    if text is None or text == AUTO:
        return text
    if not re.fullmatch(r"[0-9]{1,9}", str(text)) or int(text) < 1:
        raise ValueError(f"--expert-buffer-size must be a whole number of at least 1, or {AUTO}, got {text!r}")
    return int(text)


def _bytes(text: Any) -> int | None:
    """None for `auto`."""
    if text == AUTO:
        return None
    try:
        return parse_bytes(str(text))
    except ValueError:
        raise ValueError(f"--expert-host-memory must be a size as 64G or 500M, or {AUTO}, got {text!r}") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
