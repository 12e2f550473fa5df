"""Capacity-aware inference against a twin that walks over tokens, choices and experts one by one."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.gating.capacity import CAPACITY_SCOPES, DROP_METRICS, OVERFLOWS, REROUTE_ROUNDS, Capacity
from fairseq_moe_ext.gating.capacity import CapacityRules as Rules
from fairseq_moe_ext.gating.routing import Routing, Top1Gate, Top2Gate

TOLERANCES = {torch.float32: (1e-4, 1e-6), torch.float16: (4e-3, 1e-4), torch.bfloat16: (3e-2, 1e-3)}
WITHOUT_RANDOM = [metric for metric in DROP_METRICS if metric != "random"]


def make_routing(
    num_tokens, num_experts, num_choices, skew=1.0, padding=0.0, seed=0, policy="all", dtype=torch.float32
):
    """A gate's routing with its combine weights, skewed to some experts; a share of tokens is padding."""
    generator = torch.Generator().manual_seed(seed)
    gate = Top1Gate(4, num_experts) if num_choices == 1 else Top2Gate(4, num_experts, second_expert_policy=policy)
    gate.seed(seed)
    tokens = torch.randn(num_tokens, 4, generator=generator)
    with torch.no_grad():
        gate.wg.weight.copy_(torch.randn(num_experts, 4, generator=generator) * skew)
        mask = torch.rand(num_tokens, generator=generator) < padding
        routing = gate.to(dtype)(tokens.to(dtype), mask)
        return routing, gate.combine_weights(routing).to(dtype)


class Twin:
    """Plain Python; assignments are (token, choice) pairs."""

    def __init__(self, routing, weights, rules, ranks_of_experts, ranks_of_tokens, num_ranks, preferred=None):
        self.p = routing.probabilities.tolist()
        self.ids = [list(row) for row in routing.expert_ids.tolist()]
        self.first_ids = [list(row) for row in self.ids]
        self.wanted = routing.kept.tolist()
        self.weights = weights.tolist()
        self.rules, self.preferred = rules, preferred
        self.rank_of_expert, self.rank_of_token, self.num_ranks = ranks_of_experts, ranks_of_tokens, num_ranks
        self.num_experts, self.num_choices = len(self.p[0]) if self.p else 0, routing.expert_ids.size(1)

    def tokens_of(self, rank):
        return sum(any(wanted) for wanted, r in zip(self.wanted, self.rank_of_token, strict=True) if r == rank)

    def mean_load(self, rank):
        return self.tokens_of(rank) * self.num_choices / self.num_experts

    def limit(self, group):
        """By exact arithmetic, of the factor as it is written."""
        rank, of = group
        tokens, factor = self.tokens_of(rank), Fraction(repr(self.rules.factor))
        mean_load = Fraction(tokens * self.num_choices, self.num_experts)
        if self.rules.scope == "expert":
            return min(max(math.floor(factor * mean_load), 1), tokens)
        held = self.rank_of_expert.count(of)
        return min(max(math.floor(factor * mean_load * held), 1), tokens * self.num_choices)

    def group(self, token, expert):
        rank = self.rank_of_token[token]
        return (rank, expert if self.rules.scope == "expert" else self.rank_of_expert[expert])

    def priority(self, token, choice):
        if self.rules.metric == "score":
            return -self.p[token][self.ids[token][choice]]
        return -token if self.rules.metric == "reverse-order" else token

    def fitting(self, pairs, taken=()):
        """The pairs that find room, beside those in `taken`."""
        used, fits = {}, set()
        for pair in taken:
            group = self.group(pair[0], self.ids[pair[0]][pair[1]])
            used[group] = used.get(group, 0) + 1
        for token, choice in sorted(pairs, key=lambda pair: (self.priority(*pair), pair)):
            group = self.group(token, self.ids[token][choice])
            if used.get(group, 0) < self.limit(group):
                used[group] = used.get(group, 0) + 1
                fits.add((token, choice))
        return fits

    def choose_again(self, token, choices, barred):
        """New experts for a token's overflowing choices, the best first; the choices that found one."""
        def rank(expert):
            return (not (self.preferred and self.preferred[expert]), -self.p[token][expert], expert)

        free = sorted((e for e in range(self.num_experts) if e not in barred), key=rank)
        moved = []
        for choice, expert in zip(sorted(choices), free, strict=False):
            self.ids[token][choice] = expert
            moved.append((token, choice))
        return moved

    def run(self):
        pairs = [(t, k) for t, row in enumerate(self.wanted) for k, wanted in enumerate(row) if wanted]
        kept = self.fitting(pairs)
        tried = [set(row) for row in self.ids]
        if self.rules.overflow == "reroute":
            for _ in range(REROUTE_ROUNDS):
                for token in range(len(self.p)):
                    over = [k for t, k in pairs if t == token and (t, k) not in kept]
                    self.choose_again(token, over, set(tried[token]))
                    tried[token] |= set(self.ids[token])
                kept = self.fitting(pairs)
        elif self.rules.overflow == "expand":
            moved = []
            for token in range(len(self.p)):
                over = [k for t, k in pairs if t == token and (t, k) not in kept]
                foreign = {e for e in range(self.num_experts) if self.rank_of_expert[e] != self.rank_of_token[token]}
                moved += self.choose_again(token, over, foreign | tried[token])
            kept = kept | self.fitting(moved, kept)
        return kept

    def weight(self, token, choice, kept):
        row = self.weights[token]
        if (token, choice) not in kept:
            return 0.0
        expert, first = self.ids[token][choice], self.first_ids[token]
        if expert == first[choice]:
            weight = row[choice]
        else:
            scale = sum(row) / sum(self.p[token][first[k]] for k in range(len(first)) if self.wanted[token][k])
            weight = self.p[token][expert] * scale
        return weight

    def all_weights(self, kept):
        rows = [[self.weight(t, k, kept) for k in range(self.num_choices)] for t in range(len(self.p))]
        if self.rules.renormalize:
            rows = [
                [w * sum(before) / sum(row) if sum(row) else 0.0 for w in row]
                for row, before in zip(rows, self.weights, strict=True)
            ]
        return rows

    def overflowing(self):
        total = 0.0
        for rank in range(self.num_ranks):
            for expert in range(self.num_experts):
                load = sum(
                    self.wanted[t][k] and self.first_ids[t][k] == expert and self.rank_of_token[t] == rank
                    for t in range(len(self.p))
                    for k in range(self.num_choices)
                )
                total += max(load - self.rules.factor * self.mean_load(rank), 0.0)
        return total


@st.composite
def cases(draw, metrics=WITHOUT_RANDOM):
    num_experts, num_choices = draw(st.integers(2, 8)), draw(st.sampled_from((1, 2)))
    num_ranks = draw(st.integers(1, min(3, num_experts)))
    num_tokens = draw(st.integers(0, 14))
    routing, weights = make_routing(
        num_tokens,
        num_experts,
        num_choices,
        draw(st.sampled_from((0.0, 0.1, 1.0, 5.0))),  # 0: all probabilities are equal
        draw(st.sampled_from((0.0, 0.4, 1.0))),
        draw(st.integers(0, 10_000)),
        draw(st.sampled_from(("all", "random"))),  # random: a token's second choice may not be kept
        draw(st.sampled_from(list(TOLERANCES))),
    )
    rules = Rules(
        draw(st.sampled_from((0.3, 0.5, 0.7, 1.0, 1.1, 1.4, 1.5, 2.0, 50.0))),
        draw(st.sampled_from(OVERFLOWS)),
        draw(st.sampled_from(metrics)),
        draw(st.sampled_from(CAPACITY_SCOPES)),
        draw(st.booleans()),
    )
    ranks_of_experts = [expert % num_ranks for expert in range(num_experts)]
    ranks_of_tokens = [token * num_ranks // max(num_tokens, 1) for token in range(num_tokens)]
    preferred = draw(st.none() | st.lists(st.booleans(), min_size=num_experts, max_size=num_experts))
    return routing, weights, rules, ranks_of_experts, ranks_of_tokens, num_ranks, preferred


def limited(routing, weights, rules, ranks_of_experts, ranks_of_tokens, num_ranks, preferred=None, seed=0):
    capacity = Capacity(rules, ranks_of_experts, num_ranks)
    capacity.seed(seed)
    tokens = torch.tensor(ranks_of_tokens, dtype=torch.int64)
    return capacity.apply(routing, weights, tokens, None if preferred is None else torch.tensor(preferred))


@given(cases())
@examples(400)
def test_limited_routing_is_the_naive_twins_under_every_rule(case):
    found = limited(*case)
    routing, weights, rules, ranks_of_experts, ranks_of_tokens, num_ranks, preferred = case
    twin = Twin(routing, weights, rules, ranks_of_experts, ranks_of_tokens, num_ranks, preferred)
    kept = twin.run()
    num_tokens, num_choices = routing.expert_ids.shape
    assert found.routing.kept.tolist() == [[(t, k) in kept for k in range(num_choices)] for t in range(num_tokens)]
    for token, choice in kept:
        assert found.routing.expert_ids[token, choice] == twin.ids[token][choice]
    expected = torch.tensor(twin.all_weights(kept), dtype=weights.dtype).view(num_tokens, num_choices)
    rtol, atol = TOLERANCES[weights.dtype]
    torch.testing.assert_close(found.weights, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(found.overflowing.item(), twin.overflowing() if num_tokens else 0.0)
    moved = [[(t, k) in kept and twin.ids[t][k] != twin.first_ids[t][k] for k in range(num_choices)]
             for t in range(num_tokens)]
    assert found.rerouted.tolist() == moved


@given(cases(metrics=DROP_METRICS))
@examples(200)
def test_limited_routing_keeps_the_invariants_of_every_rule(case):
    found = limited(*case)
    routing, weights, rules, ranks_of_experts, ranks_of_tokens, num_ranks, _ = case
    twin = Twin(routing, weights, rules, ranks_of_experts, ranks_of_tokens, num_ranks)
    used = {}
    for token, (experts, kept) in enumerate(
        zip(found.routing.expert_ids.tolist(), found.routing.kept.tolist(), strict=True)
    ):
        running = [expert for expert, flag in zip(experts, kept, strict=True) if flag]
        assert len(running) == len(set(running))  # never the same expert twice
        assert len(running) <= sum(twin.wanted[token])  # never an assignment more
        for expert in running:
            group = twin.group(token, expert)
            used[group] = used.get(group, 0) + 1
    assert all(count <= twin.limit(group) for group, count in used.items())
    if rules.overflow == "drop":
        assert torch.equal(found.routing.expert_ids, routing.expert_ids)
        assert not (found.routing.kept & ~routing.kept).any()
    if rules.factor == 50.0:  # nothing overflows: to the last bit as without a capacity
        assert torch.equal(found.weights, weights) and torch.equal(found.routing.kept, routing.kept)
        assert torch.equal(found.routing.expert_ids, routing.expert_ids) and found.overflowing == 0


def test_drop_by_hand():
    """Four tokens on one of two experts, gamma 1: the mean load is 2, so two tokens stay."""
    probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])
    routing = Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool),
                      probabilities[:, :1], probabilities)
    kept = {}
    for metric in WITHOUT_RANDOM:
        found = limited(routing, routing.weights, Rules(1.0, metric=metric), [0, 0], [0] * 4, 1)
        kept[metric] = found.routing.kept.squeeze(1).nonzero().squeeze(1).tolist()
        assert found.overflowing == 2
    assert kept == {"score": [1, 3], "order": [0, 1], "reverse-order": [2, 3]}
    found = limited(routing, routing.weights, Rules(1.0, "reroute"), [0, 0], [0] * 4, 1)
    assert found.routing.expert_ids.squeeze(1).tolist() == [1, 0, 1, 0] and found.routing.kept.all()
    torch.testing.assert_close(found.weights.squeeze(1), torch.tensor([0.4, 0.9, 0.3, 0.8]))


@pytest.mark.parametrize(
    ("factor", "num_tokens", "num_experts", "num_choices", "limit"),
    [
        (1.16, 25, 2, 2, 25),  # 29, but no expert is chosen twice by a token
        (1.16, 25, 4, 2, 14),
        (1.16, 50, 4, 2, 29),  # 28.999999999999996 in floating point
        (0.57, 100, 1, 1, 57),
        (0.1, 30, 3, 1, 1),
        (1e-9, 30, 3, 1, 1),
        (1e300, 30, 3, 1, 30),
    ],
)
def test_the_limit_is_exact(factor, num_tokens, num_experts, num_choices, limit):
    """All tokens choose the first experts."""
    ids = torch.arange(num_choices).expand(num_tokens, num_choices)
    probabilities = torch.full((num_tokens, num_experts), 1 / num_experts)
    routing = Routing(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(ids.shape), probabilities)
    found = limited(routing, routing.weights, Rules(factor), [0] * num_experts, [0] * num_tokens, 1)
    assert found.routing.kept.sum(dim=0).tolist() == [limit] * num_choices


def test_random_follows_the_seed():
    routing, weights = make_routing(60, 4, 2)
    rules = Rules(0.5, metric="random")
    first, again, other = (limited(routing, weights, rules, [0] * 4, [0] * 60, 1, seed=s) for s in (7, 7, 8))
    assert torch.equal(first.routing.kept, again.routing.kept)
    assert not torch.equal(first.routing.kept, other.routing.kept)


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_capacity_of_no_tokens(overflow):
    routing, weights = make_routing(0, 4, 2)
    found = limited(routing, weights, Rules(1.0, overflow), [0, 0, 1, 1], [], 2)
    assert found.routing.expert_ids.shape == (0, 2) and found.weights.shape == (0, 2) and found.overflowing == 0


def test_one_token_always_runs():
    """The capacity of one token is 1, however small gamma is."""
    routing, weights = make_routing(1, 8, 2)
    found = limited(routing, weights, Rules(0.01), [0] * 8, [0], 1)
    assert found.routing.kept.all() and torch.equal(found.weights, weights)


def test_a_survivor_takes_the_whole_weight_if_asked():
    routing, weights = make_routing(40, 4, 2, skew=5.0)
    plain = limited(routing, weights, Rules(0.5), [0] * 4, [0] * 40, 1)
    scaled = limited(routing, weights, replace(Rules(0.5), renormalize=True), [0] * 4, [0] * 40, 1)
    lone = plain.routing.kept.sum(1) == 1
    assert lone.any() and (plain.weights[lone].sum(1) < 0.999).any()
    torch.testing.assert_close(scaled.weights[lone].sum(1), torch.ones(int(lone.sum())))
