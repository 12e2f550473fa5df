"""A token that is not a number stays alone with it (but under the dense mask, as upstream); and edges of shapes."""

import pytest
import torch
from cases import Case

from fairseq_moe_ext.gating import Routing, Top2Gate
from fairseq_moe_ext.gating.capacity import OVERFLOWS, Capacity, CapacityRules
from fairseq_moe_ext.gating.limit import Limit

CASE = Case(rows=2, positions=9, model_dim=32, hidden_dim=48, num_experts=6, padding="right")
BROKEN = (float("nan"), float("inf"), float("-inf"))
TOKEN = 0  # of the first row: what is not kept points at the first slot


@pytest.mark.parametrize("value", BROKEN, ids=str)
@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("how", ["loop", "grouped-mm", "static"])
def test_a_nan_token_changes_no_other_token(how, num_choices, value):
    case = CASE.with_(num_choices=num_choices)
    static = {"sparse": True, "capacity_fraction": 1.0, "count_padding": False}
    layer = case.layer("static", **static) if how == "static" else case.layer()
    layer.experts.use_kernel("loop" if how == "static" else how)
    x, mask = case.batch()
    with torch.no_grad():
        wanted = layer(x, mask)
        found = layer(x.index_put((torch.tensor(0), torch.tensor(TOKEN)), torch.tensor(value)), mask)
    assert not found[0, TOKEN].isfinite().all()
    others = torch.ones(x.shape[:2], dtype=torch.bool)
    others[0, TOKEN] = False
    torch.testing.assert_close(found[others], wanted[others])


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_a_nan_token_takes_no_slot_under_a_capacity(overflow):
    """Of four tokens on one expert with room for two, the best two that are numbers stay."""
    probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1], [float("nan")] * 2, [0.8, 0.2]])
    kept = torch.ones(4, 1, dtype=torch.bool)
    routing = Routing(torch.zeros(4, 1, dtype=torch.int64), kept, probabilities[:, :1], probabilities)
    capacity = Capacity(CapacityRules(1.0, overflow), [0, 0], 1)
    found = capacity.apply(routing, routing.weights, torch.zeros(4, dtype=torch.int64))
    on_first = found.routing.kept & (found.routing.expert_ids == 0)
    assert on_first.squeeze(1).tolist() == [False, True, False, True]
    assert found.weights[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_a_capacity_without_tokens(overflow, shape):
    layer = CASE.layer()
    layer.use(rules=[Limit(Capacity(CapacityRules(1.0, overflow), [0, 0, 0, 1, 1, 1], 2))])
    with torch.no_grad():
        assert layer(torch.zeros(*shape, CASE.model_dim)).shape == (*shape, CASE.model_dim)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_a_lone_expert_takes_every_token(gating):
    case = CASE.with_(num_experts=1, num_choices=1)
    layer = case.layer(gating, capacity_fraction=1.0)
    x, _ = case.with_(padding="none").batch()
    with torch.no_grad():
        wanted = layer.experts(x.flatten(0, 1), [x.size(0) * x.size(1)])
        torch.testing.assert_close(layer(x).flatten(0, 1), wanted)


def test_two_choices_need_two_experts():
    with pytest.raises(ValueError, match="num_experts must be at least 2 for top-2 gating, got 1"):
        Top2Gate(4, 1)
