"""The flags of expert buffering: the same in all three tasks, checked by name before anything is loaded."""

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest
from fairseq import tasks
from flag_makers import TASKS, assert_the_parser_refuses, parsed

from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY
from fairseq_moe_ext.serving.expert_buffer import BufferSettings, InBytes
from fairseq_moe_ext.tasks.buffer_flags import BufferFlags, buffer_settings, check_buffer_flags
from fairseq_moe_ext.tasks.flags import check_flags


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_every_flag(task):
    assert buffer_settings(parsed(task)) is None
    settings = buffer_settings(parsed(task, "--expert-buffer-size", "4"))
    assert settings == BufferSettings(4, "all", DEFAULT_POLICY, DEFAULT_ORDER, "host")
    flags = {
        "size": "auto",
        "scope": "decoder",
        "policy": "lifo",
        "order": "ascending",
        "store": "disk",
        "store_dir": Path("folder"),
        "host_memory": 3 << 29,
        "profile": Path("t.npz"),
    }
    given = (
        "--expert-buffer-size",
        "auto",
        "--expert-buffer-scope",
        "decoder",
        "--expert-eviction",
        "lifo",
        "--expert-order",
        "ascending",
        "--expert-store",
        "disk",
        "--expert-store-dir",
        "folder",
        "--expert-host-memory",
        "1.5G",
        "--expert-profile",
        "t.npz",
    )
    assert buffer_settings(parsed(task, *given)) == BufferSettings(**flags)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("auto", None),
        ("0", 0),
        ("123", 123),
        ("5K", 5120),
        ("5KB", 5120),
        ("5 KiB", 5120),
        ("2M", 2 << 20),
        ("64G", 64 << 30),
        ("0.5T", 1 << 39),
        ("7B", 7),
    ],
)
def test_sizes_of_memory(text, wanted):
    flags = Namespace(**{item.name: item.default for item in fields(BufferFlags)})
    flags.expert_buffer_size, flags.expert_store, flags.expert_host_memory = "2", "disk", text
    check_buffer_flags(flags)
    assert buffer_settings(flags).host_memory == wanted


@pytest.mark.parametrize("text, wanted", [
    ("20G", 20 << 30), ("500MB", 500 << 20), ("120000B", 120_000), ("1.5k", 1536), ("2GiB", 2 << 30),
])  # fmt: skip
def test_a_size_with_a_unit_is_in_bytes(text, wanted):
    flags = Namespace(expert_buffer_size=text)
    check_buffer_flags(flags)
    assert buffer_settings(parsed(next(iter(TASKS)), "--expert-buffer-size", text)).size == InBytes(wanted)


SIZE = (
    "--expert-buffer-size must be a whole number of at least 1, a size with its unit as 20G, 500MB or 120000B, "
    "or auto, got"
)
MEMORY = "--expert-host-memory must be a size as 64G or 500M, or auto, got"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *(
            ({"expert_buffer_size": value}, f"{SIZE} '{value}'")
            for value in ("0", "-3", "2.5", "many", "", "1e3", "٣", "1" * 12, "0G", "-1G", "5X", "G")
        ),
        *(({"expert_host_memory": value}, f"{MEMORY} '{value}'") for value in ("much", "-1G", "5X", "", "G", "1..5G")),
        ({"expert_eviction": "mru"}, "--expert-eviction must be one of lifo, fifo, lru, lfu, got 'mru'"),
        ({"expert_order": "falling"}, "--expert-order must be one of resident-first, ascending, got 'falling'"),
        ({"expert_store": "tape"}, "--expert-store must be one of host, disk, got 'tape'"),
        ({"expert_buffer_scope": "head"}, "--expert-buffer-scope must be one of all, encoder, decoder, got 'head'"),
        ({"expert_store_dir": "x"}, "--expert-store-dir needs --expert-store disk, got x without it"),
        ({"expert_host_memory": "1G"}, "--expert-host-memory needs --expert-store disk, got 1G without it"),
        ({"expert_store_dir": __file__, "expert_store": "disk"}, "--expert-store-dir must be a folder, got the file"),
        (
            {"expert_profile": __file__},
            "--expert-profile must be a trace .*: .*not a routing trace",
        ),
        ({"expert_profile": "missing.npz"}, "--expert-profile must be a trace .*: missing.npz"),
    ],
)
def test_bad_values_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        check_flags(Namespace(**flags))


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--expert-buffer-scope", "head"),
        ("--expert-eviction", "mru"),
        ("--expert-order", "falling"),
        ("--expert-store", "tape"),
    ],
)
def test_the_parser_refuses_unknown_choices(flag, value, capsys):
    assert_the_parser_refuses(flag, value, capsys)


@pytest.mark.parametrize("task", TASKS)
def test_checks_come_before_anything_is_read(task):
    with pytest.raises(ValueError, match="--expert-buffer-size .* got '0'"):
        tasks.setup_task(parsed(task, "--expert-buffer-size", "0"))


UNUSED = [{"expert_store": "disk"}, {"expert_eviction": "lifo"}, {"expert_order": "ascending"}]


@pytest.mark.parametrize("flags", UNUSED)
def test_flags_without_a_buffer_are_refused(flags):
    ((name, value),) = flags.items()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} needs --expert-buffer-size, got {value} without"):
        check_buffer_flags(Namespace(**flags))
    check_buffer_flags(Namespace(**flags, expert_buffer_size="2"))
    check_buffer_flags(Namespace())
