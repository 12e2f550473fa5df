"""The errors that more than one file raises, and how they quote others."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint that cannot be served or written: names the file, the rule and what was found."""


class ClosedError(RuntimeError):
    """A served model or an engine was used after its end."""


def one_line(error: Exception) -> str:
    """What another library has to say, for a CheckpointError's message; such texts may quote a file's content."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
