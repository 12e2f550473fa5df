"""A fairseq dictionary from a file that may hold anything."""

from __future__ import annotations

import io
from pathlib import Path

from fairseq.data import Dictionary

from fairseq_moe_ext.bounded_json import read_regular
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line

MOST_LINES = 1_000_000  # NLLB-200's has a quarter of it


def load_dictionary(file: Path) -> Dictionary:
    """As `Dictionary.load(file)`; CheckpointError names the file and what is wrong in it."""
    try:
        content = read_regular(file)
        if content.count(b"\n") > MOST_LINES:
            raise ValueError(f"it must have at most {MOST_LINES:,} lines")
        dictionary = Dictionary()
        dictionary.add_from_file(io.StringIO(content.decode("utf-8"), newline=None))
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(f"{file}: not a fairseq dictionary: {reason}") from error
    return dictionary
