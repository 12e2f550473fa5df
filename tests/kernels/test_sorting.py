"""Assignments sorted by expert and the weighted sum of a token's outputs: the C kernel's and PyTorch's beside the plain
description."""

import pytest
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import WAYS, asking_for
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_moe_ext.kernels.combine import weighted_sum
from fairseq_moe_ext.kernels.cpu_kernel import DTYPES, load_kernel
from fairseq_moe_ext.kernels.sorting import sort_assignments


def in_words(ids, kept, num_ids):
    """Each id's assignments in rising order, id by id, then all that are not kept."""
    numbered = [(number, each) for number, each in enumerate(ids) if kept[number]]
    ordered = [number for wanted in range(num_ids) for number, each in numbered if each == wanted]
    starts = [sum(each < wanted and is_kept for each, is_kept in zip(ids, kept, strict=True))
              for wanted in range(num_ids + 1)]
    rows = [ordered.index(number) if is_kept else -1 for number, is_kept in enumerate(kept)]
    return ordered + [number for number, is_kept in enumerate(kept) if not is_kept], starts, rows


@pytest.mark.parametrize("choice", WAYS)
@examples(100)
@given(assignments=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=24), num_ids=st.integers(5, 7))
def test_assignments_are_sorted_by_id(choice, assignments, num_ids):
    ids, kept = [each for each, _ in assignments], [is_kept for _, is_kept in assignments]
    tensors = torch.tensor(ids, dtype=torch.int64), torch.tensor(kept, dtype=torch.bool)
    with asking_for(choice):
        found = sort_assignments(*tensors, num_ids)
    assert tuple(each.tolist() for each in found) == in_words(ids, kept, num_ids)
    assert [each.dtype for each in found] == [torch.int64, torch.int32, torch.int64]


@pytest.mark.parametrize("choice", WAYS)
def test_ids_and_what_is_kept_may_lie_anyhow(choice):
    ids = torch.tensor([[3, 0, 1], [0, 0, 2]]).t()
    kept = torch.tensor([[True], [False], [True]]).expand(3, 2)
    with asking_for(choice):
        found = [each.tolist() for each in sort_assignments(ids, kept, 4)]
    assert tuple(found) == in_words(ids.flatten().tolist(), kept.flatten().tolist(), 4)


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_id_that_there_is_not_is_refused(bad):
    if load_kernel() is None:
        pytest.skip("the C kernel writes where an id says, PyTorch's sort does not")
    ids, kept = torch.tensor([0, bad, 2]), torch.tensor([True, False, True])
    assert sort_assignments(ids, kept, 3)[1].tolist() == [0, 1, 1, 2]  # one that is not kept says nothing
    with pytest.raises(ValueError, match="ids that are kept must be from 0 to below 3"):
        sort_assignments(ids, ~kept, 3)


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("choices", (1, 2, 3))
@pytest.mark.parametrize("dim", (1, 16, 37))
def test_choices_are_summed_in_their_order(choice, dtype, choices, dim):
    """Bit by bit: every product and sum is rounded alone, and what has no row weighs nothing, NaN or not."""
    generator = torch.Generator().manual_seed(dim)
    outputs = torch.randn(50, dim, generator=generator).to(dtype)
    rows = torch.randint(0, 49, (40, choices), generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 0.3] = -1
    weights = torch.rand(rows.shape, generator=generator)
    weights[rows < 0], outputs[49] = float("nan"), float("nan")
    wide = torch.promote_types(dtype, torch.float32)
    expected = torch.zeros(40, dim, dtype=wide)
    for token in range(40):
        for row, weight in zip(rows[token].tolist(), weights[token], strict=True):
            if row >= 0:
                expected[token] += weight.to(wide) * outputs[row].to(wide)
    with asking_for(choice):
        assert torch.equal(weighted_sum(outputs, rows, weights), expected.to(dtype))


def test_tensors_that_only_stand_for_values_take_pytorchs_way():
    """The C kernel would read or write where there is nothing."""
    with FakeTensorMode():
        found = sort_assignments(torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool), 3)
        assert [len(each) for each in found] == [6, 4, 6]
        assert weighted_sum(torch.ones(6, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)).shape == (3, 4)


def test_what_is_recorded_takes_pytorchs_way():
    kept = torch.ones(4, dtype=torch.bool)
    recorded = torch.jit.trace(lambda ids: sort_assignments(ids, kept, 3)[0], torch.tensor([2, 0, 1, 0]))
    assert recorded(torch.tensor([0, 0, 2, 1])).tolist() == [0, 1, 3, 2]


def test_a_row_that_there_is_not_is_refused():
    if load_kernel() is None:
        pytest.skip("without the C kernel PyTorch's index says so in its own words")
    with pytest.raises(ValueError, match="must be below the 2 outputs"):
        weighted_sum(torch.ones(2, 3), torch.tensor([[2]]), torch.ones(1, 1))
