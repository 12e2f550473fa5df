"""Models that the tests serve from Python, their recorded texts, and the command beside them."""

from __future__ import annotations

from pathlib import Path

import commands
from fairseq.data import data_utils

PIECES = {"post_process": "sentencepiece", "cpu": True}


def lines_of(served, name: str = "test.en-de.en") -> list[str]:
    """A file of the recorded test set, in the words of the dictionary."""
    dictionary = served._parts.task.source_dictionary
    return list(map(dictionary.string, data_utils.load_indexed_dataset(f"{served._parts.data}/{name}", dictionary)))


def interactive(folder: Path, lines: list[str], *options: str) -> commands.Generation:
    """fairseq-interactive of these lines, with more of its options."""
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--cpu", "--buffer-size", "100")
    done = commands.run("interactive", *arguments, *options, stdin="\n".join(lines) + "\n")
    return commands.Generation(done.stdout.splitlines())
