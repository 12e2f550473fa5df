"""The gates: which experts, with which weights, and what is random about them."""

import math

import pytest
import reference
import torch
from cases import Case

from fairseq_moe_ext.gating import Routing, Top1Gate, Top2Gate


def gate_for_logits(num_experts, policy="all", normalize=False, num_choices=2, dtype=torch.float32):
    """A gate whose logits are its input, to the last bit."""
    if num_choices == 1:
        gate = Top1Gate(num_experts, num_experts)
    else:
        gate = Top2Gate(num_experts, num_experts, False, policy, normalize)
    with torch.no_grad():
        gate.wg.weight.copy_(torch.eye(num_experts))
    return gate.to(dtype)


def test_top2_by_hand():
    """exp(0), exp(log 2), exp(log 5) over their sum 8: probabilities 1/8, 2/8, 5/8."""
    gate = gate_for_logits(3)
    tokens = torch.tensor([[1.0, 2.0, 5.0], [5.0, 1.0, 2.0]]).log()
    routing = gate(tokens, torch.tensor([False, True]))
    assert routing.expert_ids.tolist() == [[2, 1], [0, 2]]
    assert routing.kept.tolist() == [[True, True], [False, False]]
    assert routing.num_experts == 3
    torch.testing.assert_close(routing.probabilities, torch.tensor([[1.0, 2, 5], [5, 1, 2]]) / 8)
    weights = gate.combine_weights(routing).to(torch.float32)
    torch.testing.assert_close(weights, torch.tensor([[5 / 7, 2 / 7], [0, 0]]))


def test_a_lone_survivor_weighs_one_unless_normalised_before():
    tokens = torch.tensor([[1.0, 2.0, 5.0]]).log()
    fits = torch.tensor([[False, True]])
    for normalize, expected in ((False, [[0.0, 1.0]]), (True, [[0.0, 2 / 7]])):
        gate = gate_for_logits(3, normalize=normalize)
        weights = gate.combine_weights(gate(tokens).keep_only(fits)).to(torch.float32)
        torch.testing.assert_close(weights, torch.tensor(expected))


def test_top1_weight_is_the_probability_unnormalised():
    gate = gate_for_logits(3, num_choices=1)
    tokens = torch.tensor([[1.0, 2.0, 5.0], [5.0, 1.0, 2.0]]).log()
    routing = gate(tokens, torch.tensor([False, True]))
    assert routing.expert_ids.tolist() == [[2], [0]]
    assert routing.kept.tolist() == [[True], [False]]
    torch.testing.assert_close(gate.combine_weights(routing).to(torch.float64), torch.tensor([[5 / 8], [0]]).double())


def test_of_equal_experts_the_lower_number_wins():
    routing = gate_for_logits(4)(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 1.0, 1.0], [2.0, 0.0, 0.0, 2.0]]))
    assert routing.expert_ids.tolist() == [[0, 1], [1, 2], [0, 3]]


def test_the_second_choice_is_never_the_first():
    """Not even where softmax leaves nothing to the rest: the logits decide."""
    routing = gate_for_logits(3)(torch.tensor([[0.0, 5000.0, 900.0]]))
    assert routing.expert_ids.tolist() == [[1, 2]] and routing.weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_gating_starts_after_the_product(dtype):
    """The logits are the model's dtype's, everything after them float32, and the weights come back."""
    case = Case(rows=4, positions=32, model_dim=32, num_experts=8, dtype=dtype, use_fp32=True)
    layer = case.layer()
    tokens = case.batch()[0].flatten(0, 1)
    routing = layer.gate(tokens)
    assert routing.probabilities.dtype == torch.float32 and routing.weights.dtype == torch.float32
    logits = torch.nn.functional.linear(tokens, layer.gate.wg.weight)
    assert torch.equal(routing.probabilities, torch.softmax(logits.float(), dim=1))
    assert not torch.equal(logits.float(), tokens.float() @ layer.gate.wg.weight.float().T)
    assert layer.gate.combine_weights(routing).to(dtype).dtype == dtype
    plain = case.with_(use_fp32=False).layer().gate(tokens)
    assert plain.probabilities.dtype == dtype


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
def test_only_random_policies_draw(policy, num_choices):
    case = Case(num_choices=num_choices)
    gate = case.layer(policy=policy).gate
    before = torch.get_rng_state()
    gate(case.batch()[0].flatten(0, 1))
    drew = not torch.equal(before, torch.get_rng_state())
    assert drew == (num_choices == 2 and policy != "all")
    if num_choices == 2:
        assert gate.is_random == drew


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_a_seed_makes_random_policies_reproducible(policy):
    """The same numbers after the same seed, others after another, and a stream that moves on with every call."""
    case = Case(rows=4, positions=16, num_experts=8)
    gate, tokens = case.layer(policy=policy).gate, case.batch()[0].flatten(0, 1)

    def draw(seed):
        gate.seed(seed)
        before = torch.get_rng_state()
        routings = [gate(tokens), gate(tokens)]
        assert torch.equal(before, torch.get_rng_state())  # the global stream has no part in it
        return [(routing.expert_ids * routing.kept).tolist() for routing in routings]

    first = draw(3)
    assert draw(3) == first
    assert draw(4) != first
    assert first[0] != first[1]


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_without_a_seed_random_policies_obey_the_training_stream(policy):
    case = Case(rows=4, positions=16, num_experts=8)
    gate, tokens = case.layer(policy=policy).gate, case.batch()[0].flatten(0, 1)

    def draw(seed):
        torch.manual_seed(seed)
        routing = gate(tokens)
        return (routing.expert_ids * routing.kept).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rest", [[4.0, 1.0, 0.0, 2.0, -1.0], [8.0] + [0.0] * 30, [1.0] * 12])
def test_sampling_follows_the_softmax_over_the_rest(rest, dtype):
    """A chi-square over the second choices of many equal tokens; upstream's noise is float32 whatever the model's."""
    logits = torch.tensor([20.0, *rest])
    gate = gate_for_logits(len(logits), "sampling", dtype=dtype)
    gate.seed(0)
    number = 30_000
    routing = gate(logits.to(dtype).expand(number, -1))
    assert (routing.expert_ids[:, 0] == 0).all() and routing.kept.all()
    counts = torch.bincount(routing.expert_ids[:, 1], minlength=len(logits)).double()[1:]
    expected = number * torch.softmax(logits[1:].double(), dim=0)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(rest) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8  # about one seed in 10,000
    # the noise chooses, it does not weigh
    chosen = routing.expert_ids[:, 1:]
    assert torch.equal(routing.weights[:, 1:], routing.probabilities.gather(1, chosen))


@pytest.mark.parametrize("probabilities", [
    [0.88, 0.05, 0.04, 0.03], [0.70, 0.20, 0.06, 0.04], [0.50, 0.45, 0.03, 0.02], [0.46, 0.45, 0.05, 0.04],
])
@pytest.mark.parametrize("normalize", [True, False])
def test_random_keeps_the_second_choice_with_twice_its_weight(probabilities, normalize):
    """The experts are the two best; the second is kept in a share min(1, 2 g2) of the tokens."""
    number = 20_000
    gate = gate_for_logits(4, "random", normalize)
    gate.seed(1)
    routing = gate(torch.tensor(probabilities).log().expand(number, 4))
    assert (routing.expert_ids == torch.tensor([0, 1])).all() and routing.kept[:, 0].all()
    first, second, *_ = (value / sum(probabilities) for value in probabilities)
    share = min(1.0, 2 * (second / (first + second) if normalize else second))
    bound = 4 * math.sqrt(share * (1 - share) / number) + 1e-4
    assert routing.kept[:, 1].double().mean().item() == pytest.approx(share, abs=bound)


def test_random_gives_a_lone_first_choice_the_whole_weight():
    gate = gate_for_logits(3, "random")
    gate.seed(0)
    routing = gate(torch.tensor([0.7, 0.2, 0.1]).log().expand(200, 3))
    weights = gate.combine_weights(routing).to(torch.float32)
    alone = ~routing.kept[:, 1]
    assert 0 < alone.sum() < 200
    torch.testing.assert_close(weights[alone], torch.tensor([[1.0, 0.0]]).expand(int(alone.sum()), 2))
    torch.testing.assert_close(weights[~alone], torch.tensor([[7 / 9, 2 / 9]]).expand(int((~alone).sum()), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalising_vanishing_weights_divides_by_the_dtypes_eps(dtype):
    """The sum of two vanishing weights is held above the dtype's eps."""
    gate = gate_for_logits(3, dtype=dtype)
    routing = gate(torch.zeros(1, 3, dtype=dtype))
    tiny = torch.finfo(dtype).eps / 4
    routing = Routing(routing.expert_ids, routing.kept, torch.full((1, 2), tiny, dtype=dtype), routing.probabilities)
    weights = gate.combine_weights(routing).to(dtype)
    expected = reference.normalised([tiny, tiny], torch.finfo(dtype).eps)
    torch.testing.assert_close(weights, torch.tensor([expected], dtype=dtype))
    nothing = gate.combine_weights(routing.keep_only(torch.zeros(1, 2, dtype=torch.bool)))
    assert not nothing.any()


def test_bad_arguments_name_argument_rule_and_value():
    with pytest.raises(ValueError, match="^second_expert_policy must be one of all, sampling, random, got 'best'$"):
        Top2Gate(4, 4, second_expert_policy="best")
    with pytest.raises(ValueError, match="^num_experts must be at least 2 for top-2 gating, got 1$"):
        Top2Gate(4, 1)
    with pytest.raises(ValueError, match="^num_experts must be at least 1 for top-1 gating, got 0$"):
        Top1Gate(4, 0)
    assert Top1Gate(4, 1)(torch.randn(3, 4)).weights.tolist() == [[1.0]] * 3
    assert Top2Gate(4, 2).second_expert_policy == "sampling"  # upstream's default
