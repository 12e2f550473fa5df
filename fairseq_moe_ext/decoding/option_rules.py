"""What options of a search and its batches may say, alone and beside each other: for the commands and for Python.

fairseq dies of most other values in the middle of a run, and takes some for others: no sentence is printed under
`--nbest -2`, and a batch of 0 sentences is one without a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Rule:
    """`says` goes on after "must be"."""

    says: str
    holds: Callable[[Any], bool]


def whole(least: int, most: int | None = None) -> Rule:
    """A whole number; `most` None: of any size."""

    def holds(value: Any) -> bool:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and least <= value and (most is None or value <= most)

    return Rule(f"at least {least}" if most is None else f"a whole number from {least} to {most}", holds)


def number(least: float, most: float, above: bool = False) -> Rule:
    """A number, none that is infinite or nan; above: not `least` itself."""

    def holds(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and least <= value <= most and not (above and value == least)

    return Rule(f"a number {'above' if above else 'from'} {least} {'and up ' if above else ''}to {most}", holds)


# of what the user gave: defaults as -1 stand for none. The bounds are far beyond what is of use, and within what a
# float holds
VALUES = {
    "beam": whole(1),
    "nbest": whole(1),
    "max_len_a": number(0, 1_000_000),
    "max_len_b": whole(0),
    "min_len": whole(0),
    "lenpen": number(-50, 50),
    "unkpen": number(-1_000_000, 1_000_000),
    "temperature": number(0, 1_000_000, above=True),
    "sampling_topk": whole(1),
    "sampling_topp": number(0, 1, above=True),
    "diverse_beam_groups": whole(1),
    "diverse_beam_strength": number(-1_000_000, 1_000_000),
    "diversity_rate": number(0, 1_000_000, above=True),
    "no_repeat_ngram_size": whole(0),
    "prefix_size": whole(0),
    "lm_weight": number(-1_000_000, 1_000_000),
    "seed": whole(0, 2**32 - 1),  # NumPy's
    "batch_size": whole(1),
    "max_tokens": whole(1),
    "required_batch_size_multiple": whole(1),
    "required_seq_len_multiple": whole(1),
    "num_batch_buckets": whole(0),
    "num_workers": whole(0),
    "data_buffer_size": whole(0),
    "buffer_size": whole(0),
    "tokens_per_sample": whole(1),
    "context_window": whole(0),
    "softmax_batch": whole(1),
}
# an option -> the option without which it does nothing
NEEDS = {
    "sampling_topk": "sampling",
    "sampling_topp": "sampling",
    "diverse_beam_strength": "diverse_beam_groups",
    "retain_dropout_modules": "retain_dropout",
}
SEARCHES = ("sampling", "diverse_beam_groups", "match_source_len", "diversity_rate", "constraints")
# two options of which one leaves the other without effect
EXCLUDES = (
    *combinations(SEARCHES, 2),
    ("sampling_topk", "sampling_topp"),
    ("lenpen", "unnormalized"),
    *((option, "match_source_len") for option in ("max_len_a", "max_len_b")),
    # fairseq's search under constraints may end with fewer hypotheses than beams, of which its aligner takes all
    ("print_alignment", "constraints"),
)


def check_values(given: Mapping[str, Any], name: Callable[[str], str]) -> None:
    """ValueError at the first option whose number breaks its rule.

    given: what the user gave of their own; name: an option as they write it. Texts are of options that a task accepts
    without reading them.
    """
    for option, value in given.items():
        rule = VALUES.get(option)
        if rule is not None and isinstance(value, int | float) and not rule.holds(value):
            raise ValueError(f"{name(option)} must be {rule.says}, got {value}")


def check_pairs(
    given: Mapping[str, Any],
    name: Callable[[str], str],
    needs: Mapping[str, str] = NEEDS,
    excludes: Iterable[tuple[str, str]] = EXCLUDES,
) -> None:
    """ValueError at the first of the `given` options that has no effect without, or beside, another one."""
    for option, other in needs.items():
        if option in given and other not in given:
            raise ValueError(f"{name(option)} needs {name(other)}, got {given[option]} without it")
    for option, other in excludes:
        if option in given and other in given:
            values = f"{given[option]} and {given[other]}"
            raise ValueError(f"{name(option)} must not go with {name(other)}, got {values}")


def check_beams(generation: Any, name: Callable[[str], str]) -> None:
    """ValueError where the numbers of a `generation` do not fit each other: hypotheses, beams, groups, lengths."""
    beam, groups = generation.beam, generation.diverse_beam_groups
    if generation.nbest > beam:
        raise ValueError(f"{name('nbest')} must be at most {name('beam')}, {beam}, got {generation.nbest}")
    if groups > 0 and beam % groups:
        raise ValueError(f"{name('diverse_beam_groups')} must divide {name('beam')}, got {groups} and {beam}")
    longest = generation.max_len_b
    if generation.max_len_a == 0 and not generation.match_source_len and generation.min_len > longest:
        raise ValueError(f"{name('min_len')} must be at most {name('max_len_b')}, {longest}, got {generation.min_len}")


def check_words(generation: Any, vocab_size: int) -> None:
    """ValueError where a `generation` asks for more words than there are; of more beams fairseq takes fewer."""
    beam, topk = getattr(generation, "beam", 1), getattr(generation, "sampling_topk", -1)
    if beam >= vocab_size:
        raise ValueError(f"--beam must be below the {vocab_size} words, got {beam}")
    if topk > vocab_size:
        raise ValueError(f"--sampling-topk must be at most the {vocab_size} words, got {topk}")
