"""Table 1's columns of registered architectures, and the rule that compares them."""

from dataclasses import replace

import pytest

from reproduction.configurations import compare, last_digit, published, registered


@pytest.mark.parametrize("key", ["lm-small", "mt"])
def test_architectures_are_the_published_ones(key):
    finding = compare(published(key), registered(key))
    assert finding.holds and "all equal" in finding.here


def test_parameters_by_hand():
    """LM-Small: 6 of 12 layers have 512 experts of two matrices and their biases."""
    row = registered("lm-small")
    assert row.expert_parameters == 6 * 512 * (2 * 768 * 3072 + 768 + 3072)
    assert row.parameters - row.expert_parameters > 12 * 4 * 768**2 + 6 * 2 * 768 * 3072 + 51200 * 768


def test_what_differs_is_named():
    paper = published("lm")
    finding = compare(paper, replace(paper, whose="ours", parameters=54e9, hidden_dim=2048))
    assert not finding.holds
    assert "parameters 54B, the paper's 52B" in finding.here and "hidden dim 2,048, the paper's 4,096" in finding.here


def test_last_digit_of_published_sizes():
    assert [last_digit(value) for value in (52e9, 54.5e9, 355e6, 3.3e9)] == [1e9, 1e8, 1e6, 1e8]
