"""fairseq-generate's lines: which hypothesis and which reference belong together, and their scores by sacrebleu."""

import pytest
import sacrebleu

from fairseq_moe_ext.command_line.translations import read_translations

# sentence 1 first, two hypotheses of it, line ends of Unicode in a text, and what the command says beside
LINES = (
    "a log's line - 3\nS-1\tu\nT-1\tx y\u2028z w\nH-1\t-0.1\tx@@ y\nD-1\t-0.1\txy z w\nP-1\t-0.1 -0.2\nH-1\t-2\tq\n"
    "D-1\t-2\tq\nS-0\ta\nT-0\tu v\tw\nH-0\t-0.2\tu v\nD-0\t-0.2\tu v\tw\nGenerate test with beam=4: BLEU = 1\n"
)


def test_texts_are_the_best_hypotheses_and_references_by_number():
    found = read_translations(LINES)
    assert found.numbers == (0, 1)
    assert found.hypotheses == ("u v\tw", "xy z w") and found.references == ("u v\tw", "x y\u2028z w")
    assert read_translations(LINES, "H").hypotheses == ("u v", "x@@ y")
    assert found.length_ratio == (5 + 6) / (5 + 7)


def test_scores_are_sacrebleus():
    found = read_translations(LINES)
    texts = [list(found.hypotheses), [list(found.references)]]
    assert found.bleu() == sacrebleu.corpus_bleu(*texts).score
    assert found.bleu("char", True) == sacrebleu.corpus_bleu(*texts, tokenize="char", lowercase=True).score
    assert found.chrf() == sacrebleu.corpus_chrf(*texts).score
    assert found.chrf(2) == sacrebleu.corpus_chrf(*texts, word_order=2).score != found.chrf()


@pytest.mark.parametrize("lines", ["", "T-0\tx\n", "D-0\t-1\tx\n", "T-0\tx\nD-1\t-1\tx\n"])
def test_a_sentence_without_its_pair_is_refused(lines):
    with pytest.raises(ValueError, match="every T line must have a D line, and there must be one"):
        read_translations(lines)
