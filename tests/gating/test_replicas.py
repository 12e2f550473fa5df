"""Copies of a layer's experts on ranks, against a naive twin: one list of (rank, expert), searched by loops."""

import pytest
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.balancing.placement import contiguous, experts_of_rank
from fairseq_moe_ext.gating.plan import plan_by_expert
from fairseq_moe_ext.gating.replicas import Replicas
from fairseq_moe_ext.gating.routing import Routing

UNEVEN = [[0], [0], [0], [1], [3]]  # of four ranks, the third without an expert
PERMUTED = [[2], [0], [1], [1], [0], [2]]
REPLICAS = [[1, 0, 2], [2], [0, 2], [1]]


def copies_in_order(placement, world_size: int) -> list[tuple[int, int]]:
    return [(rank, expert) for rank in range(world_size) for expert, on in enumerate(placement) if rank in on]


@st.composite
def placements(draw):
    """(a placement, R), with and without replicas, ranks without experts among them."""
    world_size = draw(st.integers(1, 5))
    most = draw(st.sampled_from((1, world_size)))
    ranks = st.lists(st.integers(0, world_size - 1), min_size=1, max_size=most, unique=True)
    return draw(st.lists(ranks, min_size=1, max_size=8)), world_size


def test_choose_by_hand():
    replicas = Replicas(REPLICAS, rank=0, world_size=3)
    assert replicas.local == [(0, 2), (0, 3), (0, 1, 2)]
    assert (replicas.per_rank, replicas.num_replicas, replicas.num_experts) == ([2, 2, 3], 7, 4)
    # replicas 0 to 6 are of experts 0 2 | 0 3 | 0 1 2
    assert replicas.choose(torch.tensor([[0, 2], [0, 1], [0, 3], [2, 0]])).tolist() == [[0, 1], [2, 5], [4, 3], [6, 0]]
    assert replicas.fold([1, 10, 2, 100, 3, 1000, 20]) == [6, 1000, 30, 100]
    assert [replicas.chosen_whole(rank) for rank in range(3)] == [[0, 5, 1, 3], [2, 5, 6, 3], [4, 5, 1, 3]]


def test_ranks_begin_with_different_copies():
    """Else a few assignments from each of many ranks would all go to the first replica."""
    lone = torch.tensor([[0]])
    begun = [Replicas([[0, 1, 2]], rank, world_size=3).choose(lone).item() for rank in range(3)]
    assert sorted(begun) == [0, 1, 2]


def test_padding_does_not_alternate_between_replicas():
    """Else, every second token being padding, all assignments would go to the same one of two replicas."""
    kept = torch.tensor([[True], [False]] * 4)
    routing = Routing(torch.zeros(8, 1, dtype=torch.int64), kept, kept.float(), torch.ones(8, 1))
    replicas = Replicas([[0, 1]], rank=0, world_size=2)
    chosen = replicas.choose(routing.expert_ids, routing.kept)
    assert plan_by_expert(routing, routing.weights, chosen, replicas.num_replicas).load == [2, 2]


@pytest.mark.parametrize(
    ("placement", "world_size"),
    [(contiguous(5, 3), 3), (contiguous(4, 1), 1), (PERMUTED, 3), (UNEVEN, 4), (REPLICAS, 3), ([[1]], 2)],
)
def test_local_replicas_are_the_placements(placement, world_size):
    for rank in range(world_size):
        replicas = Replicas(placement, rank, world_size)
        assert replicas.local == [experts_of_rank(placement, each) for each in range(world_size)]
        in_order = [(each, expert) for each, held in enumerate(replicas.local) for expert in held]
        assert in_order == copies_in_order(placement, world_size)
        assert replicas.per_rank == [len(held) for held in replicas.local]


@examples(150)
@given(placements(), st.integers(0, 30), st.integers(1, 3), st.sampled_from((0.0, 0.5, 1.0)), st.integers(0, 1000))
def test_every_kept_assignment_goes_to_a_copy_of_its_expert_and_all_copies_get_as_many(
    where, num_tokens, choices, share, seed
):
    placement, world_size = where
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.randint(len(placement), (num_tokens, choices), generator=generator)
    kept = torch.rand(expert_ids.shape, generator=generator) >= share
    in_order = copies_in_order(placement, world_size)
    for rank in range(world_size):
        chosen = Replicas(placement, rank, world_size).choose(expert_ids, kept)
        assert chosen.shape == expert_ids.shape
        assert [in_order[replica][1] for replica in chosen[kept].tolist()] == expert_ids[kept].tolist()
        received = torch.bincount(chosen[kept], minlength=len(in_order)).tolist()
        for expert in range(len(placement)):
            counts = [received[replica] for replica, (_, of) in enumerate(in_order) if of == expert]
            assert max(counts) - min(counts) <= 1
            assert sum(counts) == int((expert_ids[kept] == expert).sum())


@examples(100)
@given(placements(), st.integers(0, 1000))
def test_folding_sums_what_an_experts_copies_did(where, seed):
    placement, world_size = where
    in_order = copies_in_order(placement, world_size)
    counts = torch.randint(100, (len(in_order),), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = [0] * len(placement)
    for (_, expert), count in zip(in_order, counts, strict=True):
        wanted[expert] += count
    assert Replicas(placement, 0, world_size).fold(counts) == wanted


@examples(100)
@given(placements())
def test_static_gating_takes_one_copy_per_expert_and_ranks_go_round_them(where):
    placement, world_size = where
    in_order = copies_in_order(placement, world_size)
    replicas = Replicas(placement, 0, world_size)
    chosen = [replicas.chosen_whole(rank) for rank in range(world_size)]
    assert all([in_order[replica][1] for replica in row] == list(range(len(placement))) for row in chosen)
    for expert, ranks in enumerate(placement):
        taken = [row[expert] for row in chosen]
        counts = [taken.count(replica) for replica, (_, of) in enumerate(in_order) if of == expert]
        assert len(counts) == len(ranks) and max(counts) - min(counts) <= 1
    # every rank knows what another has chosen
    assert [Replicas(placement, rank, world_size).chosen_whole(0) for rank in range(world_size)] == [
        chosen[0]
    ] * world_size
