"""Which experts a token goes to, and how their weights are normalised: the C kernel's and PyTorch's beside the plain
description."""

import math
import struct

import pytest
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import WAYS, asking_for
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_moe_ext.kernels.choosing import choose_experts, normalize
from fairseq_moe_ext.kernels.cpu_kernel import load_kernel

NAN, INF = float("nan"), float("inf")
SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 3e-40, INF, -INF, NAN])  # few, so that many are equal


def largest(values):
    """The first of the largest; a NaN is larger than all."""
    found = 0
    for number, value in enumerate(values):
        is_nan, was_nan = math.isnan(value), math.isnan(values[found])
        if (is_nan and not was_nan) or value > values[found]:
            found = number
    return found


def chosen(probabilities, logits):
    first = largest(probabilities)
    if logits is None:
        return [first]
    return [first, largest([-INF if number == first else value for number, value in enumerate(logits)])]


@pytest.mark.parametrize("choice", WAYS)
@examples(150)
@given(
    rows=st.integers(2, 9).flatmap(
        lambda experts: st.lists(st.tuples(*[st.lists(SCORES, min_size=experts, max_size=experts)] * 2), max_size=5)
    ),
    padding=st.none() | st.lists(st.booleans(), min_size=5, max_size=5),
    num_choices=st.sampled_from([1, 2]),
)
def test_the_largest_and_the_largest_of_the_others(choice, rows, padding, num_choices):
    experts = len(rows[0][0]) if rows else 3
    probabilities, logits = (torch.tensor([row[which] for row in rows]).view(-1, experts) for which in (0, 1))
    mask = None if padding is None else torch.tensor(padding[: len(rows)], dtype=torch.bool)
    with asking_for(choice):
        expert_ids, kept, weights = choose_experts(probabilities, logits if num_choices == 2 else None, mask)
    expected = [chosen(row, its if num_choices == 2 else None) for row, its in rows]
    assert expert_ids.tolist() == expected and expert_ids.shape == (len(rows), num_choices)
    assert kept.shape == weights.shape == expert_ids.shape
    for token, ids in enumerate(expected):
        assert kept[token].tolist() == [padding is None or not padding[token]] * num_choices
        torch.testing.assert_close(weights[token], probabilities[token, ids], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("choice", WAYS)
def test_scores_and_padding_may_lie_anyhow(choice):
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[False, True], [True, True], [False, False], [False, True]])
    with asking_for(choice):
        found = choose_experts(scores.t(), scores.t(), mask[:, 0])
        plain = choose_experts(scores.t().contiguous(), scores.t().contiguous(), mask[:, 0].contiguous())
    assert all(map(torch.equal, found, plain)) and found[1][:, 1].tolist() == [True, False, True, True]


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("choice", WAYS)
@examples(150)
@given(
    st.integers(1, 3).flatmap(
        lambda choices: st.lists(
            st.lists(st.tuples(st.sampled_from([0.0, 1e-30, 1e-9, 0.1, 0.3, 0.7, NAN]), st.booleans()),
                     min_size=choices, max_size=choices),
            min_size=1, max_size=6,
        )
    )
)
def test_weights_are_normalised_over_what_is_kept(choice, tokens):
    weights = torch.tensor([[weight for weight, _ in token] for token in tokens])
    kept = torch.tensor([[is_kept for _, is_kept in token] for token in tokens])
    expected = []
    for token, is_kept in zip(weights.tolist(), kept.tolist(), strict=True):
        total = 0.0
        for weight, counts in zip(token, is_kept, strict=True):
            total = float32(total + weight) if counts else total
        total = 2.0**-23 if total < 2.0**-23 else total
        parts = zip(token, is_kept, strict=True)
        expected.append([float32(weight / total) if counts else 0.0 for weight, counts in parts])
    with asking_for(choice):
        found = normalize(weights, kept)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("choice", WAYS)
def test_gradients_go_through_the_weights(choice):
    """The C kernel gives none: PyTorch's way is taken where they are wanted."""
    logits = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True)
    with asking_for(choice):
        ids, kept, weights = choose_experts(logits.softmax(1), logits, None)
        normalize(weights, kept)[0, 0].backward()
    assert ids.tolist() == [[1, 0]]
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0, 0.0]]) * weights.prod() / weights.sum() ** 2)


def test_scores_that_do_not_fit_are_refused():
    if load_kernel() is None:
        pytest.skip("without the C kernel PyTorch says so in its own words")
    scores = torch.rand(3, 4)
    for scored, words in (
        ((scores, scores[:2], None), "logits alike"),
        ((scores[:, :0], None, None), "must be of experts"),
        ((scores, None, torch.zeros(2, dtype=torch.bool)), "padding_mask must be of 3 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_experts(*scored)
    with pytest.raises(ValueError, match="kept must be of the weights' shape"):
        normalize(scores, torch.ones(3, 3, dtype=torch.bool))


def test_tensors_that_only_stand_for_values_take_pytorchs_way():
    with FakeTensorMode():
        scores = torch.ones(3, 4)
        found = choose_experts(scores, scores, None)
        assert [each.shape for each in (*found, normalize(found[2], found[1]))] == [(3, 2)] * 4
