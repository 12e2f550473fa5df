"""What the subcommands share: their parsers, the values of their options, and how they fail."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from fairseq_moe_ext.byte_sizes import parse_bytes
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.kept_source import Keep

NO_MATPLOTLIB = "needs matplotlib: pip install 'fairseq_moe_ext[reproduce]'"


def command_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `fairseq-moe <name>`; doc: its help, as it is written."""
    how = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"fairseq-moe {name}", description=doc, formatter_class=how)


def positive(text: str) -> int:
    """An option's value, a whole number of at least 1: 0 must not pass for what was left out."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """An option's value in seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds of 0 or more, got {text!r}")
    return value


def byte_size(text: str) -> int:
    """An option's value in bytes, as every flag reads a size."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def keep_of(keep: str | None, pair: str | None) -> Keep | None:
    """What `--keep FILE --pair SOURCE-TARGET` say; None without. CheckpointError where one does not go with the other.

    Without a pair: a language model's, which has one language, "".
    """
    if keep is None:
        if pair is not None:
            raise CheckpointError(f"--pair needs --keep, got {pair} without it")
        return None
    languages = ("", "") if pair is None else tuple(pair.split("-"))
    if len(languages) != 2 or pair is not None and not all(languages):
        raise CheckpointError(f"--pair must be two languages such as eng_Latn-fra_Latn, got {pair!r}")
    return Keep(keep, languages)


def has_matplotlib() -> bool:
    """Plots are an extra."""
    return importlib.util.find_spec("matplotlib") is not None


def failed(error: Exception | str, code: int = 1) -> int:
    """Say what failed, on one line of stderr; returns `code`. A checkpoint is no flag of these commands."""
    print(f"error: {str(error).removeprefix('--path ')}", file=sys.stderr)
    return code
