"""Static gating's parts: capacity, slots and the dense mask."""

import pytest
import reference
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.gating import Routing
from fairseq_moe_ext.gating.static import (
    assign_slots,
    dense_combine_weights,
    static_capacity,
    static_combine,
    static_dispatch,
)


def make_routing(expert_ids, kept=None, num_experts=3, certainty=None):
    expert_ids = torch.tensor(expert_ids)
    kept = torch.ones_like(expert_ids, dtype=torch.bool) if kept is None else torch.tensor(kept)
    probabilities = torch.zeros(expert_ids.size(0), num_experts)
    if certainty is not None:
        probabilities[:, 0] = torch.tensor(certainty)
    return Routing(expert_ids, kept, torch.ones(expert_ids.shape), probabilities)


@examples(60)
@given(
    st.integers(1, 5000),
    st.integers(2, 129),
    st.sampled_from((1, 2)),
    st.sampled_from((-1.0, 0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5)),
    st.booleans(),
)
def test_capacity_is_the_tables(num_tokens, num_experts, num_choices, fraction, training):
    expected = reference.capacity_of(num_tokens, num_experts, num_choices, fraction, training)
    assert static_capacity(num_tokens, num_experts, num_choices, fraction, training) == expected


@pytest.mark.parametrize("arguments, capacity", [
    ((1024, 8, 2, 0.05, False), 52),
    ((288, 8, 2, 0.1, False), 29),
    ((1024, 8, 2, -1.0, False), 256),
    ((1024, 8, 1, -1.0, False), 128),
    ((1024, 8, 1, 0.25, True), 128),
    ((9, 8, 2, 0.25, True), 4),
])
def test_capacity_as_upstream_recorded_it(arguments, capacity):
    assert static_capacity(*arguments) == capacity


def test_second_choices_queue_after_all_first_choices():
    """Expert 0 is first choice of tokens 0 and 3, second choice of 1 and 2."""
    routing = make_routing([[0, 1], [1, 0], [2, 0], [0, 2]])
    assert assign_slots(routing).tolist() == [[0, 1], [0, 2], [0, 3], [1, 1]]


def test_the_queue_counts_first_choices_beyond_the_capacity():
    """Three first choices and capacity 2: a second choice stands fourth, not third."""
    routing = make_routing([[0, 1], [0, 1], [0, 2], [1, 0]])
    slots = assign_slots(routing)
    assert slots.tolist() == [[0, 1], [1, 2], [2, 0], [0, 3]]
    assert (slots < 2).tolist() == [[True, True], [True, False], [False, True], [True, False]]


def test_what_is_not_kept_queues_nowhere():
    routing = make_routing([[0, 1], [0, 1], [0, 1]], [[False, True], [True, False], [True, True]])
    slots = assign_slots(routing)
    assert slots[routing.kept].tolist() == [0, 0, 1, 1]


def test_batch_prioritised_the_most_certain_queue_first():
    routing = make_routing([[0, 1], [0, 1], [1, 0], [0, 2]], certainty=[0.4, 0.9, 0.5, 0.8])
    assert assign_slots(routing, True).tolist() == [[2, 2], [0, 1], [0, 3], [1, 0]]
    assert assign_slots(routing).tolist() == [[0, 1], [1, 2], [0, 3], [2, 0]]


@examples(60)
@given(st.data())
def test_slots_are_the_twins(data):
    num_experts = data.draw(st.integers(1, 6))
    num_choices = data.draw(st.sampled_from((1, 2)))
    num_tokens = data.draw(st.integers(1, 40))
    experts = st.lists(st.integers(0, num_experts - 1), min_size=num_choices, max_size=num_choices)
    flags = st.lists(st.booleans(), min_size=num_choices, max_size=num_choices)
    expert_ids = data.draw(st.lists(experts, min_size=num_tokens, max_size=num_tokens))
    kept = data.draw(st.lists(flags, min_size=num_tokens, max_size=num_tokens))
    certainty = data.draw(st.permutations([number / num_tokens for number in range(num_tokens)]))
    routing = make_routing(expert_ids, kept, num_experts, certainty)
    for prioritized in (False, True):
        order = sorted(range(num_tokens), key=lambda token: -certainty[token]) if prioritized else range(num_tokens)
        slots = assign_slots(routing, prioritized).masked_fill(~routing.kept, reference.NO_SLOT)
        assert slots.tolist() == reference.queue(expert_ids, kept, order)


def test_the_dense_mask_by_hand():
    routing = make_routing([[0, 2], [0, 1], [1, 0]])
    slots = assign_slots(routing)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    routing = routing.keep_only(slots < 2)
    dense = dense_combine_weights(routing, slots, weights * routing.kept, 2)
    assert dense.shape == (3, 3, 2)
    entries = {tuple(index): dense[tuple(index)].item() for index in dense.nonzero().tolist()}
    assert entries == {(0, 0, 0): 0.75, (0, 2, 0): 0.25, (1, 0, 1): 0.5, (1, 1, 1): 0.5, (2, 1, 0): 1.0}

    tokens = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    rows = static_dispatch(tokens, dense)  # (E * C, D): expert 0 has tokens 0 and 1, 1 has 2 and 1, 2 has 0
    assert rows[:, 0].tolist() == [1, 2, 3, 2, 1, 0]
    assert rows[:, 1].tolist() == [10, 20, 30, 20, 10, 0]
    scale = torch.tensor([1.0, 1.0, 10.0, 10.0, 100.0, 100.0]).unsqueeze(1)  # each expert's number shows in the output
    combined = static_combine(rows * scale, dense)
    assert combined[:, 0].tolist() == [0.75 * 1 + 0.25 * 100, 0.5 * 2 + 0.5 * 20, 30.0]


@examples(30)
@given(st.integers(1, 20), st.integers(2, 6), st.integers(1, 8), st.integers(0, 1000))
def test_no_slot_holds_two_tokens(num_tokens, num_experts, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(num_experts, (num_tokens, 1), generator=generator)
    step = torch.randint(1, num_experts, (num_tokens, 1), generator=generator)
    routing = make_routing(torch.cat((first, (first + step) % num_experts), dim=1).tolist(), None, num_experts)
    slots = assign_slots(routing)
    routing = routing.keep_only(slots < capacity)
    dense = dense_combine_weights(routing, slots, routing.weights * routing.kept, capacity)
    assert dense.bool().sum(dim=0).max() <= 1
    assert dense.bool().sum().item() == routing.kept.sum().item()
    # slots fill from the first on, without a hole
    filled = dense.bool().any(dim=0)
    assert torch.equal(filled, torch.arange(capacity).unsqueeze(0) < filled.sum(dim=1, keepdim=True))
