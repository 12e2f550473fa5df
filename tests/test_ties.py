"""The comparison up to ties hides no difference."""

import commands
import pytest
from ties import Hypothesis, assert_same_generation, assert_same_hypotheses


def sentence(*hypotheses: tuple[str, float]) -> list[Hypothesis]:
    return [Hypothesis(words, score, (score, score / 2)) for words, score in hypotheses]


EXPECTED = [sentence(("a b", -1.0), ("a c", -1.5), ("b", -1.500001), ("c", -2.0)), sentence(("d", -0.5), ("e", -0.6))]


def change(number: int, *hypotheses: tuple[str, float]) -> list[list[Hypothesis]]:
    found = list(EXPECTED)
    found[number] = sentence(*hypotheses)
    return found


def test_equal_scores_stand_in_either_order():
    assert assert_same_hypotheses(EXPECTED, EXPECTED) == 0
    swapped = change(0, ("a b", -1.0), ("b", -1.5), ("a c", -1.500001), ("c", -2.0))
    assert assert_same_hypotheses(swapped, EXPECTED) == 0
    rounded = change(1, ("d", -0.500004), ("e", -0.599996))
    assert assert_same_hypotheses(rounded, EXPECTED) == 0


def test_either_of_two_beams_of_one_score_may_be_the_one_found():
    assert assert_same_hypotheses(change(0, ("a b", -1.0), ("a c", -1.5), ("b", -1.5), ("x", -2.0)), EXPECTED) == 0
    assert assert_same_hypotheses(change(1, ("x", -0.5), ("e", -0.6)), EXPECTED) == 1


@pytest.mark.parametrize("found", [
    change(1, ("d", -0.5), ("x", -0.61)),  # other words, another score
    change(1, ("d", -0.5), ("e", -0.60002)),  # another score alone
    change(1, ("e", -0.5), ("d", -0.6)),  # swapped words at different scores
    change(1, ("e", -0.6), ("d", -0.5)),  # swapped hypotheses at different scores
    change(1, ("d", -0.5)),  # one is missing
    change(0, ("a b", -1.0), ("a c", -1.5), ("a c", -1.500001), ("x", -2.0)),  # twice the same for another
    change(0, ("x", -1.0), ("a c", -1.5), ("b", -1.5), ("y", -2.0)),  # more than one that the score alone excuses
    EXPECTED[:1],
    [*reversed(EXPECTED)],
])
def test_what_is_no_tie_fails(found):
    with pytest.raises(AssertionError):
        assert_same_hypotheses(found, EXPECTED)


def test_the_tokens_scores_count():
    found = [EXPECTED[0], [Hypothesis("d", -0.5, (-0.5, -0.2501)), EXPECTED[1][1]]]
    with pytest.raises(AssertionError):
        assert_same_hypotheses(found, EXPECTED)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_words_that_are_wrong_everywhere_are_no_ties(number):
    """Of a hundred hypotheses two may be others; a broken dictionary would change them all and no score."""
    expected = [sentence((f"w{index}", -index / 7)) for index in range(100)]
    found = [sentence((f"{'x' if index < number else 'w'}{index}", -index / 7)) for index in range(100)]
    if number <= 2:
        assert assert_same_hypotheses(found, expected) == number
    else:
        with pytest.raises(AssertionError, match="sentence 2"):
            assert_same_hypotheses(found, expected)


def lines(*best: tuple[int, str, float], bleu: float = 20.5) -> commands.Generation:
    found = [line for number, words, score in best
             for line in (f"H-{number}\t{score}\t{words}", f"P-{number}\t{score} {score}")]
    return commands.Generation([*found, f"Generate test with beam=4: BLEU = {bleu}"])


def test_lines():
    expected = lines((3, "a", -1.0), (3, "b", -1.000004), (1, "c", -0.25))
    assert_same_generation(lines((3, "b", -1.0), (3, "a", -1.000004), (1, "c", -0.25), bleu=20.4), expected)
    for found in (
        lines((3, "a", -1.0), (3, "b", -1.000004), (1, "c", -0.25), bleu=20.4),  # with the same best hypotheses
        lines((1, "c", -0.25), (3, "a", -1.0), (3, "b", -1.000004)),
        lines((3, "a", -1.0), (1, "b", -1.000004), (1, "c", -0.25)),
        lines((3, "c", -1.0), (3, "d", -1.000004), (1, "c", -0.25)),
        lines((3, "a", -1.0), (3, "b", -1.000004), (1, "c", -0.26)),
    ):
        with pytest.raises(AssertionError):
            assert_same_generation(found, expected)
