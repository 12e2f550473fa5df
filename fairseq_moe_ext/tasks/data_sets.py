"""What is said of a split of the data before fairseq reads it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fairseq import utils

logger = logging.getLogger("fairseq_moe_ext")


def check_not_empty(flags: Any, split: str) -> None:
    """ValueError where a file of the split holds nothing: fairseq dies of that in ways that do not name it."""
    languages = (getattr(flags, "source_lang", None), getattr(flags, "target_lang", None))
    pairs = ["-".join(languages), "-".join(languages[::-1])] if all(languages) else [""]
    for folder in utils.split_paths(flags.data):
        for pair in pairs:
            for file in Path(folder).glob(f"{split}.{pair}*bin"):
                if file.stat().st_size == 0:
                    raise ValueError(f"--gen-subset {split}: the data set must hold a sentence, {file} holds none")


def warn_of_other_parts(flags: Any, split: str) -> None:
    """fairseq takes a split to be evaluated from the first of the data's folders alone."""
    first, *others = utils.split_paths(flags.data)
    holding = [folder for folder in others if any(Path(folder).glob(f"{split}.*"))]
    if holding:
        logger.warning("--gen-subset %s is served of %s alone, not of %s", split, first, ", ".join(holding))
