"""Hypotheses compared up to ties: of two whose scores are equal to rounding either may come first, or be the one found.

Which of them a search keeps is decided by the last bit, and so by the instructions of the CPU. What is no tie fails: an
order that the scores do not excuse, and words that only the score excuses where they are more than a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import commands
import numpy as np

TIE = 1e-5  # between scores
EXCUSED = 0.02  # of all hypotheses, and one at least: as many may be others of the same score


@dataclass(frozen=True)
class Hypothesis:
    """words: tokens or a text. score: of the whole. positions: scores of its tokens, where they are known."""

    words: tuple[int, ...] | str
    score: float
    positions: tuple[float, ...] = ()


def of_tokens(sentences: Sequence[Sequence[dict]]) -> list[list[Hypothesis]]:
    """What fairseq's generators return, a list of hypotheses per sentence."""
    return [
        [
            Hypothesis(tuple(each["tokens"].tolist()), float(each["score"]), tuple(each["positional_scores"].tolist()))
            for each in sentence
        ]
        for sentence in sentences
    ]


def of_lines(generation: commands.Generation) -> dict[int, list[Hypothesis]]:
    """By sentence, in the order of the lines."""
    best = generation.of_kind("H")
    positions = [tuple(map(float, fields[0].split())) for _, fields in generation.of_kind("P")] or [()] * len(best)
    found: dict[int, list[Hypothesis]] = {}
    for (sentence, (score, words)), scores in zip(best, positions, strict=True):
        found.setdefault(sentence, []).append(Hypothesis(words, float(score), scores))
    return found


def paired(
    found: Sequence[Sequence[Hypothesis]], expected: Sequence[Sequence[Hypothesis]], tie: float = TIE, rtol: float = 0.0
) -> list[tuple[Hypothesis, Hypothesis]]:
    """Each found hypothesis with the expected one of the same words, but for those that a tie excuses.

    Per sentence there are as many, and their scores are the same in the same order, to `tie` plus `rtol` times them.
    """
    assert len(found) == len(expected)
    pairs, excused, allowed = [], 0, max(1, EXCUSED * sum(map(len, expected)))
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        what = f"sentence {number}: {ours} in place of {theirs}"
        assert len(ours) == len(theirs), what
        left = list(theirs)
        for one, there in zip(ours, theirs, strict=True):
            assert np.isclose(one.score, there.score, rtol=rtol, atol=tie), what
            same = [each for each in left if each.words == one.words]
            if same and np.isclose(one.score, same[0].score, rtol=rtol, atol=tie):
                pairs.append((one, same[0]))
                left.remove(same[0])
        excused += len(left)
        assert excused <= allowed, what
    return pairs


def assert_same_hypotheses(
    found: Sequence[Sequence[Hypothesis]],
    expected: Sequence[Sequence[Hypothesis]],
    tie: float = TIE,
    positions: float = TIE,
    rtol: float = 0.0,
) -> int:
    """`paired`, with the scores of every token the same to `positions` plus `rtol` times them.

    Returns of how many sentences the best hypothesis is another.
    """
    for one, there in paired(found, expected, tie, rtol):
        np.testing.assert_allclose(one.positions, there.positions, rtol=rtol, atol=positions, err_msg=f"{there}")
    best = [(ours[0].words, theirs[0].words) for ours, theirs in zip(found, expected, strict=True) if ours]
    return sum(ours != theirs for ours, theirs in best)


def assert_same_generation(
    found: commands.Generation, expected: commands.Generation, tie: float = TIE, positions: float = 2e-4
) -> None:
    """The same sources, references and sentences in the same order, hypotheses up to ties, and what says their BLEU.

    positions: scores of tokens are printed to 4 places.
    """
    for kind in "ST":
        assert found.of_kind(kind) == expected.of_kind(kind)
    assert [number for number, _ in found.of_kind("H")] == [number for number, _ in expected.of_kind("H")]
    ours, theirs = of_lines(found), of_lines(expected)
    others = assert_same_hypotheses(list(ours.values()), list(theirs.values()), tie, positions)
    last, wanted = found.lines[-1], expected.lines[-1]
    assert last == wanted or (others and last.split("=")[:2] == wanted.split("=")[:2])
