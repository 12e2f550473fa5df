"""Dynamic gating's dispatch and combine."""

import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.gating import Routing
from fairseq_moe_ext.gating.plan import plan_by_expert
from fairseq_moe_ext.kernels.combine import weighted_sum


def make_routing(expert_ids, kept=None, num_experts=3):
    expert_ids = torch.tensor(expert_ids, dtype=torch.int64).view(len(expert_ids), -1)
    kept = torch.ones_like(expert_ids, dtype=torch.bool) if kept is None else torch.tensor(kept)
    return Routing(expert_ids, kept, torch.ones(expert_ids.shape), torch.zeros(expert_ids.size(0), num_experts))


def plan_of(routing):
    return plan_by_expert(routing, routing.weights * routing.kept)


def test_top2_by_hand():
    plan = plan_of(make_routing([[2, 0], [0, 1], [2, 1], [0, 2]], num_experts=4))
    assert plan.load == [3, 2, 3, 0]
    assert plan.token_ids.tolist() == [0, 1, 3, 1, 2, 0, 2, 3]
    assert plan.assignments.tolist() == [1, 2, 6, 3, 5, 0, 4, 7]
    tokens = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    rows = tokens[plan.token_ids]
    assert rows.flatten().tolist() == [1, 2, 4, 2, 3, 1, 3, 4]
    assert plan.row_ids.tolist() == [[5, 0], [1, 3], [6, 4], [2, 7]]
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75], [2.0, 1.0]])
    scale = torch.tensor([1.0, 1, 1, 10, 10, 100, 100, 100]).unsqueeze(1)
    result = weighted_sum(rows * scale, plan.row_ids, weights)
    assert result.flatten().tolist() == [50.5, 2.0, 97.5, 408.0]


def test_top1_by_hand():
    plan = plan_of(make_routing([[1], [0], [1], [0]], [[True], [True], [False], [True]]))
    assert plan.load == [2, 1, 0]
    assert plan.token_ids.tolist() == plan.assignments.tolist() == [1, 3, 0, 2]  # the last is not kept
    assert plan.offsets.on_device.tolist() == [0, 2, 3, 3] and plan.row_ids.tolist() == [[2], [0], [-1], [1]]


def test_a_plan_without_kept_assignments_combines_to_zero():
    plan = plan_of(make_routing([[1, 0], [0, 2]], [[False, False], [False, False]]))
    assert plan.load == [0, 0, 0]
    rows = torch.full((4, 5), float("nan"))  # whatever lies there
    assert torch.equal(weighted_sum(rows, plan.row_ids, torch.ones(2, 2)), torch.zeros(2, 5))
    assert torch.equal(weighted_sum(rows[:0], plan.row_ids, torch.ones(2, 2)), torch.zeros(2, 5))


@examples(60)
@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 3), st.integers(0, 1000))
def test_a_permutation_of_what_is_kept_and_its_inverse(num_tokens, num_experts, num_choices, seed):
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.randint(num_experts, (num_tokens, num_choices), generator=generator)
    kept = torch.rand((num_tokens, num_choices), generator=generator) < 0.7
    weights = torch.rand((num_tokens, num_choices), generator=generator)
    tokens = torch.randn(num_tokens, 4, generator=generator)
    plan = plan_of(Routing(expert_ids, kept, weights, torch.zeros(num_tokens, num_experts)))

    expected = [  # by expert, within an expert by token and choice
        (token * num_choices + choice, token)
        for expert in range(num_experts)
        for token in range(num_tokens)
        for choice in range(num_choices)
        if expert_ids[token, choice] == expert and kept[token, choice]
    ]
    found = list(zip(plan.assignments.tolist(), plan.token_ids.tolist(), strict=True))
    assert found[: len(expected)] == expected and len(found) == num_tokens * num_choices
    for row, (assignment, token) in enumerate(expected):
        assert plan.row_ids[token, assignment % num_choices] == row
    counts = [int(((expert_ids == expert) & kept).sum()) for expert in range(num_experts)]
    assert plan.load == counts

    rows = tokens[plan.token_ids]
    rows[len(expected) :] = float("nan")
    # experts that hand their rows through: what comes back is the token times its kept weights
    result = weighted_sum(rows, plan.row_ids, plan.weights)
    torch.testing.assert_close(result, tokens * (weights * kept).sum(dim=1, keepdim=True))
