"""Which of fairseq's own commands this process is; a program of the user's is none, whatever its name ends in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fairseq_cli

COMMANDS = ("eval_lm", "generate", "interactive", "train", "validate")


def fairseqs_command() -> str | None:
    """One of COMMANDS: `python -m fairseq_cli.generate`, that file, or pip's script `fairseq-generate` for it.

    None for everything else, also for a script of the user's that calls fairseq's function.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    for command in COMMANDS:
        if spec is not None:
            if spec.name == f"fairseq_cli.{command}":
                return command
        elif file is not None and (_is_module(file, command) or _is_script(file, main, command)):
            return command
    return None


def program() -> str:
    """As the user knows it: `fairseq-eval-lm`, or his own program's name."""
    command = fairseqs_command()
    return Path(sys.argv[0]).name if command is None else f"fairseq-{command.replace('_', '-')}"


def _is_module(file: str, command: str) -> bool:
    return os.path.realpath(file) == os.path.realpath(Path(fairseq_cli.__path__[0], f"{command}.py"))


def _is_script(file: str, main: object, command: str) -> bool:
    """pip's script takes `cli_main` from fairseq's module and has the command's name."""
    called, module = getattr(main, "cli_main", None), sys.modules.get(f"fairseq_cli.{command}")
    named = Path(file).name.removesuffix(".exe").removesuffix("-script.py") == f"fairseq-{command.replace('_', '-')}"
    return named and module is not None and called is getattr(module, "cli_main", None)
