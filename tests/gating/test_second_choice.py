"""A token goes without its second expert where that one's share is small, whatever its batch-mates do."""

import math

import pytest
import torch
from cases import TOLERANCE, Case, expert_list
from kept_makers import load, logits

from fairseq_moe_ext.gating.second_choice import BINS, SecondChoice

CASE = Case(rows=4, positions=9, num_experts=5, skew=1.0, padding="left")


@torch.no_grad()
def served(threshold, case=CASE):
    """(layer, its output, what it told)."""
    layer, calls = case.layer(), []
    layer.prepare_for_serving(1, calls.append)
    if threshold is not None:
        layer.use(rules=[SecondChoice(threshold)])
    return layer, layer(*case.batch()), calls[0]


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.45])
def test_is_the_weighted_sum_of_what_is_left(threshold, normalize_before):
    layer, found, told = served(threshold, CASE.with_(normalize_before_dropping=normalize_before))
    x, mask = CASE.batch()
    tokens, experts, expected = x.flatten(0, 1), expert_list(layer), torch.zeros_like(x.flatten(0, 1)).double()
    dropped, histogram = 0, [0] * BINS
    for number, token in enumerate(tokens):
        if mask.flatten()[number]:
            continue
        (first, second), ids = (each.tolist() for each in torch.softmax(layer.gate.wg.weight @ token, dim=0).topk(2))
        histogram[min(BINS - 1, math.floor((first / (first + second) - 0.5) * 2 * BINS))] += 1
        weights = [first / (first + second), second / (first + second)]
        if weights[1] < threshold:
            weights, dropped = weights[:1] if normalize_before else [1.0], dropped + 1
        for weight, expert in zip(weights, ids, strict=False):
            expected[number] += weight * experts[expert](token, torch.relu)
    torch.testing.assert_close(found.flatten(0, 1), expected.float(), **TOLERANCE[torch.float32])
    assert 0 < dropped < int((~mask).sum()) and told.dropped == dropped
    assert list(told.first_shares) == histogram


def test_zero_counts_and_changes_no_bit():
    (_, found, told), (_, wanted, without) = served(0.0), served(None)
    assert torch.equal(found, wanted) and told.dropped == 0
    assert sum(told.first_shares) == int((~CASE.batch()[1]).sum()) and list(without.first_shares) == []


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch():
    layer, found, _ = served(0.3)
    x, mask = CASE.batch()
    for row in range(len(x)):
        assert torch.equal(layer(x[row : row + 1], mask[row : row + 1])[0], found[row])


def test_numbers_that_are_none_stay():
    layer, told = CASE.layer(), []
    layer.prepare_for_serving(1, told.append)
    layer.use(rules=[SecondChoice(0.5)])
    x, mask = CASE.batch()
    x[1, -1] = float("nan")
    layer(x, mask)
    assert told[0].dropped == int((~mask).sum()) - 1  # all others lose a choice


def test_in_a_served_model(golden_folder):
    folder = golden_folder("tiny_mt")
    whole = logits(load(folder, "tiny_mt"))
    assert torch.equal(logits(load(folder, "tiny_mt", "--moe-second-choice-threshold", "0")), whole)
    assert not torch.equal(logits(load(folder, "tiny_mt", "--moe-second-choice-threshold", "0.4")), whole)


@pytest.mark.parametrize("flags, sentence", [
    (("0.6",), "--moe-second-choice-threshold must be a share from 0 to 0.5, got 0.6"),
    (("nan",), "--moe-second-choice-threshold must be a share from 0 to 0.5, got nan"),
    (("0.1", "--moe-gating", "static"), "--moe-second-choice-threshold needs --moe-gating dynamic, got 0.1 with"),
])
def test_refuses_what_cannot_be(golden_folder, flags, sentence):
    with pytest.raises(ValueError) as error:
        load(golden_folder("tiny_mt"), "tiny_mt", "--moe-second-choice-threshold", *flags)
    assert str(error.value).startswith(sentence)


def test_refuses_a_model_of_one_choice(golden_folder):
    with pytest.raises(ValueError, match="--moe-second-choice-threshold needs a model with two choices per token"):
        load(golden_folder("tiny_lm_top1"), "tiny_lm_top2", "--moe-second-choice-threshold", "0.1")
