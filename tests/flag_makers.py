"""Flags as the three tasks read them from a command line."""

from __future__ import annotations

import commands
import pytest

# task -> the command that it is asked by, and what that command wants besides
TASKS = {
    "moe_language_modeling": ("eval_lm", ()),
    "moe_translation": ("generate", ("-s", "en", "-t", "de")),
    "moe_translation_multi_simple_epoch": (
        "generate",
        ("--langs", "en,de", "--lang-pairs", "en-de", "-s", "en", "-t", "de"),
    ),
}


def parsed(task: str, *flags: str):
    """The task's configuration."""
    command, arguments = TASKS[task]
    return commands.parse(command, "data", "--task", task, "--path", "x.pt", *arguments, *flags).task


def assert_the_parser_refuses(flag: str, value: str, capsys) -> None:
    """The last line that it says names both. Of one task: all have the same flags."""
    with pytest.raises(SystemExit):
        parsed("moe_translation", flag, value)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert flag in message and value in message
