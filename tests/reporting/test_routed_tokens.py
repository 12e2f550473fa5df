"""Which experts ran every token: the order of sentences, and agreement counted by hand."""

import numpy as np
import pytest

from fairseq_moe_ext.reporting.routed_tokens import NONE, Agreement, RoutedTokens, agreements

LAYER = "decoder.layers.1.moe_layer"


def routed(sentences, lengths, experts) -> RoutedTokens:
    """experts: per token of the batches' order its choices."""
    return RoutedTokens.of_batches(sentences, {"decoder": lengths}, {LAYER: [np.array(experts, dtype=np.int16)]})


def test_tokens_are_in_the_sentences_order_whatever_the_batches():
    first = routed([7, 2], [2, 1], [[1, 0], [2, 0], [3, 0]])
    found = RoutedTokens.of_batches(
        [2, 7], {"decoder": [1, 2]}, {LAYER: [np.array([[3, 0]]), np.array([[1, 0], [2, 0]])]}
    )
    for each in (first, found, RoutedTokens.unpack(first.pack())):
        assert each.sentences.tolist() == [2, 7] and each.lengths["decoder"].tolist() == [1, 2]
        assert each.experts[LAYER].tolist() == [[3, 0], [1, 0], [2, 0]]


def test_agreement_of_sets_and_of_first_choices():
    a = routed([0], [4], [[1, 0], [2, 3], [2, 1], [4, NONE]])
    b = routed([0], [4], [[1, 0], [3, 2], [2, 0], [4, 0]])
    assert agreements(a, b) == agreements(b, a) == [Agreement(LAYER, 4, 0.5, 0.75)]


def test_one_choice_beside_two_agrees_where_the_second_did_not_run():
    one, two = routed([0], [2], [[1], [2]]), routed([0], [2], [[1, NONE], [2, 0]])
    assert agreements(one, two) == [Agreement(LAYER, 2, 0.5, 1.0)]


@pytest.mark.parametrize(("other", "words"), [
    (routed([0, 3], [1, 1], [[1], [1]]), "both must serve the same sentences, got 2 and 2"),
    (routed([0, 1], [2, 1], [[1], [1], [1]]), "both must score the same tokens, got 2 and 3 in the decoder"),
])
def test_other_tokens_are_refused(other, words):
    with pytest.raises(ValueError, match=words):
        agreements(routed([0, 1], [1, 1], [[1], [1]]), other)
