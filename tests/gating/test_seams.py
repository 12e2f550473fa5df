"""A gate, rule, dispatcher and schedule of another kind find their place in a layer that knows of none of them."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from cases import TOLERANCE, Case, expert_list

from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.experts.schedule import Step
from fairseq_moe_ext.gating.routing import GATES, Gate, Routing, Top2Gate, gate_of_model

CASE = Case(rows=3, positions=7, num_experts=5, skew=1.0, padding="left")


def served(layer):
    calls = []
    layer.prepare_for_serving(1, calls.append)
    return layer, calls


@torch.no_grad()
def output(layer):
    return layer(*CASE.batch())


class FirstChoiceAlone:
    """A rule: tokens whose first choice is likely enough go nowhere else."""

    def __init__(self, threshold: float):
        self.threshold, self.seeds = threshold, []

    def seed(self, seed):
        self.seeds.append(seed)

    def __call__(self, routing, call):
        unsure = routing.weights[:, :1] < self.threshold
        return routing.keep_only(torch.cat((torch.ones_like(unsure), unsure), dim=1))


@pytest.mark.parametrize("normalize_before", [False, True])
def test_a_rule_changes_the_routing_before_anything_moves(normalize_before):
    layer, calls = served(CASE.with_(normalize_before_dropping=normalize_before).layer())
    rule = FirstChoiceAlone(0.6)
    layer.use(rules=[rule])
    layer.seed(3)
    found = output(layer)
    x, mask = CASE.batch()
    tokens, experts, expected = x.flatten(0, 1), expert_list(layer), torch.zeros_like(x.flatten(0, 1)).double()
    dropped = 0
    for number, token in enumerate(tokens):
        if mask.flatten()[number]:
            continue
        probabilities = torch.softmax(layer.gate.wg.weight.detach() @ token, dim=0)
        (first, second), ids = (each.tolist() for each in probabilities.topk(2))
        weights = [first / (first + second), second / (first + second)] if normalize_before else [first, second]
        if weights[0] >= 0.6:
            weights, dropped = weights[:1], dropped + 1
        if not normalize_before:  # after what was dropped
            weights = [weight / sum(weights) for weight in weights]
        for weight, expert in zip(weights, ids, strict=False):
            expected[number] += weight * experts[expert](token, torch.relu)
    torch.testing.assert_close(found.flatten(0, 1), expected.float(), **TOLERANCE[torch.float32])
    assert 0 < dropped < int((~mask).sum()) and calls[0].dropped == dropped
    assert sum(calls[0].load_before) - sum(calls[0].load) == dropped and rule.seeds == [3]


@dataclass(frozen=True)
class Assignments:
    """As planned by the dispatcher below."""

    routing: Routing
    found: list

    @property
    def load(self):
        return torch.bincount(torch.tensor([expert for _, _, expert in self.found]), minlength=5).tolist()


class OneByOne:
    """A dispatcher: every assignment by itself, the last one first."""

    gating = "one by one"
    counts_padding = False
    spans_ranks = False

    def whole_call(self):
        return nullcontext()

    def batch(self, x, mask, training, serving):
        return x, mask

    def plan(self, routing, call):
        kept = routing.kept.nonzero().tolist()
        return Assignments(routing, [(token, choice, int(routing.expert_ids[token, choice])) for token, choice in kept])

    def run(self, planned, call):
        outputs = call.tokens.new_empty(len(planned.found), call.tokens.size(1))
        for number, (token, _, expert) in reversed(list(enumerate(planned.found))):
            counts = [int(each == expert) for each in range(call.experts.num_experts)]
            outputs[number] = call.experts(call.tokens[token : token + 1], counts)
        return outputs

    def combine(self, outputs, planned, call):
        weights, result = call.gate.combine_weights(planned.routing), torch.zeros_like(call.tokens)
        for row, (token, choice, _) in zip(outputs, planned.found, strict=True):
            result[token] += row * weights[token, choice]
        return result


def test_a_dispatcher_moves_the_tokens_in_its_own_way():
    plain, wanted_calls = served(CASE.layer())
    layer, calls = served(CASE.layer())
    layer.use(dispatcher=OneByOne())
    assert layer.gating == "one by one"
    torch.testing.assert_close(output(layer), output(plain), **TOLERANCE[torch.float32])
    assert calls[0].load == wanted_calls[0].load and calls[0].dropped == 0


class Backwards:
    """A schedule: one expert after another, the last one first, those without rows left out."""

    def __init__(self):
        self.seen = []

    def steps(self, rows_per_expert):
        for expert in reversed(range(len(rows_per_expert))):
            if rows_per_expert[expert] > 0:
                self.seen.append(expert)
                yield Step(expert, expert + 1, [expert])


def test_a_schedule_computes_the_experts_in_its_own_order():
    plain, calls = served(CASE.layer())
    layer, _ = served(CASE.layer())
    schedule = Backwards()
    experts = ResidentExperts(CASE.num_experts, CASE.model_dim, CASE.hidden_dim, torch.relu, schedule=schedule)
    experts.load_state_dict(layer.experts.state_dict())
    layer.use(experts=experts.eval())
    assert torch.equal(output(layer), output(plain))
    assert schedule.seen == [expert for expert in (4, 3, 2, 1, 0) if calls[0].load[expert]]


class Top3Gate(Gate):
    """A gate: three experts a token, of models whose second expert is chosen by a policy of that name."""

    num_choices = 3

    @classmethod
    def of_model(cls, moe, model_dim):
        return cls(model_dim, moe.moe_expert_count) if moe.moe_second_expert_policy == "third" else None

    def forward(self, tokens, padding_mask=None):
        _, probabilities = self.score(tokens)
        weights, expert_ids = probabilities.topk(3)
        return Routing(expert_ids, ~padding_mask[:, None].expand_as(expert_ids), weights, probabilities)


@torch.no_grad()
def test_a_gate_chooses_in_its_own_way(monkeypatch):
    monkeypatch.setattr("fairseq_moe_ext.gating.routing.GATES", [Top3Gate, *GATES])
    of_model = {"moe_expert_count": CASE.num_experts, "moe_gating": "dynamic"}
    assert type(gate_of_model(MoEConfig(**of_model), CASE.model_dim)) is Top2Gate
    gate = gate_of_model(MoEConfig(**of_model, moe_second_expert_policy="third"), CASE.model_dim)
    plain = CASE.layer()
    layer, calls = served(type(plain)(gate, plain.experts, plain.dispatcher))
    x, mask = CASE.batch()
    found = layer(x, mask).flatten(0, 1)
    for number in (~mask.flatten()).nonzero().flatten().tolist():
        token = x.flatten(0, 1)[number]
        weights, ids = torch.softmax(gate.wg.weight @ token, dim=0).topk(3)
        experts = expert_list(layer)
        expected = sum(weight * experts[expert](token, torch.relu) for weight, expert in zip(weights, ids, strict=True))
        torch.testing.assert_close(found[number], expected.float(), **TOLERANCE[torch.float32])
    assert sum(calls[0].load) == 3 * int((~mask).sum())
