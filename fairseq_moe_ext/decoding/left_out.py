"""What does not fit is an error, or left out where the user asked for that; never left out without a word."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
from fairseq.data import FairseqDataset

logger = logging.getLogger("fairseq_moe_ext")

SKIP = "--skip-invalid-size-inputs-valid-test"


def keep_fitting(
    indices: np.ndarray,
    dataset: FairseqDataset,
    max_positions,
    skip: bool,
    unit: str = "sentences",
    tell_of_nothing: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Those of `indices` whose items are within the model's positions (an int, or one of source and target).

    ValueError where an item is not and `skip` is off, or where nothing is left. unit: what an item is.
    tell_of_nothing: in place of the latter where `skip` is on, since others may follow; gets the sentence.
    """
    kept, ignored = dataset.filter_indices_by_size(indices, max_positions)
    if len(ignored) == 0:
        return kept
    rule = f"{unit} must not be longer than the model's and the task's positions, {_describe(max_positions)}"
    if len(kept) == 0:
        sentence = f"{rule}: nothing is left of {len(indices)} {unit} ({_tokens(dataset, indices)} tokens)"
        if not skip or tell_of_nothing is None:
            raise ValueError(sentence)
        tell_of_nothing(sentence)
        return kept
    left_out = (
        f"{len(ignored)} of {len(indices)} {unit} ({_tokens(dataset, ignored)} of {_tokens(dataset, indices)} tokens)"
    )
    if not skip:
        raise ValueError(f"{rule}: {left_out} would be left out (the first: {ignored[0]}); {SKIP} leaves them out")
    logger.warning("%s left out: %s", left_out, rule)
    return kept


def check_max_tokens(indices: Iterable[int], dataset: FairseqDataset, max_tokens: int | None) -> None:
    """ValueError where an item has more than `max_tokens`, so that no batch can hold it."""
    longest = max((dataset.num_tokens(index) for index in indices), default=0)
    if max_tokens is not None and longest > max_tokens:
        raise ValueError(f"--max-tokens must be at least the tokens of the longest item, {longest}, got {max_tokens}")


def _describe(max_positions) -> str:
    if isinstance(max_positions, int | float):
        return str(max_positions)
    return " and ".join(str(number) for number in max_positions)


def _tokens(dataset: FairseqDataset, indices: Iterable[int]) -> int:
    """Of both sides, where an item has two."""
    return int(sum(np.sum(dataset.size(index)) for index in indices))
