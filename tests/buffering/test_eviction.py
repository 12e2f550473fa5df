"""Eviction against naive twins: histories read back from the beginning, and every schedule tried out."""

from functools import cache
from itertools import combinations

import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.buffering.eviction import AGEING, ORDERS, POLICIES, Buffer, minimum_misses

EXPERTS = 6
BATCHES = st.lists(st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS), max_size=12)
PAIRS = [(policy, order) for policy in POLICIES for order in ORDERS]


def twin(batches, size, policy, order, initial):
    """(expert, hit, evicted) of every turn: each decision looks the whole history up anew."""
    resident, history, turns = list(initial), [], []  # resident in the order they came in; history: (batch, expert)
    for number, batch in enumerate(batches):
        here = [expert for expert in resident if expert in batch] if order == "resident-first" else []
        for expert in sorted(here) + sorted(set(batch) - set(here)):
            if expert in resident:
                turns.append((expert, True, None))
            else:
                evicted = None
                if len(resident) == size:
                    idle = [other for other in resident if other not in batch]
                    evicted = choose(policy, idle or resident, history, number)
                    resident.remove(evicted)
                resident.append(expert)
                turns.append((expert, False, evicted))
            history.append((number, expert))
    return turns, resident


def choose(policy, candidates, history, now):
    """`candidates` in the order they came in."""
    used = [expert for _, expert in history]
    if policy == "lifo":
        return candidates[-1]
    if policy == "fifo":
        return candidates[0]
    never = [expert for expert in candidates if expert not in used]
    if never:
        return never[-1]
    by_last_use = sorted(candidates, key=lambda expert: len(used) - used[::-1].index(expert))
    if policy == "lru":
        return by_last_use[0]
    return min(by_last_use, key=lambda expert: round(sum(AGEING ** (now - at) for at, e in history if e == expert), 9))


@pytest.mark.parametrize(("policy", "order"), PAIRS)
@examples(150)
@given(BATCHES, st.integers(1, EXPERTS), st.integers(0, EXPERTS))
def test_every_access_is_the_naive_twins(policy, order, batches, size, started):
    initial = list(range(min(size, started)))
    buffer = Buffer(size, policy, order, initial)
    turns = [(access.expert, access.hit, access.evicted) for batch in batches for access in buffer.run(batch)]
    wanted, resident = twin(batches, size, policy, order, initial)
    assert turns == wanted
    assert list(buffer.resident) == resident


@pytest.mark.parametrize(("policy", "order"), PAIRS)
@examples(60)
@given(BATCHES, st.integers(1, EXPERTS))
def test_a_buffer_never_holds_more_than_its_size(policy, order, batches, size):
    buffer = Buffer(size, policy, order, range(size))
    for batch in batches:
        accesses = buffer.run(batch)
        assert sorted(access.expert for access in accesses) == sorted(batch)
        assert len(buffer.resident) == size
        assert batch == [] or accesses[-1].expert in buffer.resident


@pytest.mark.parametrize("policy", POLICIES)
@examples(100)
@given(BATCHES, st.integers(1, EXPERTS))
def test_resident_first_never_misses_what_the_batch_found_there(policy, batches, size):
    buffer = Buffer(size, policy, "resident-first", range(size))
    for batch in batches:
        there = set(buffer.resident)
        assert {access.expert for access in buffer.run(batch) if access.hit} == there & set(batch)


def fewest_of_an_order(batches, size, initial):
    """Every choice of whom to evict, in rising ids."""
    turns = [expert for batch in batches for expert in sorted(batch)]

    @cache
    def fewest(number, resident):
        if number == len(turns):
            return 0
        expert = turns[number]
        if expert in resident:
            return fewest(number + 1, resident)
        if len(resident) < size:
            return 1 + fewest(number + 1, resident | {expert})
        return 1 + min(fewest(number + 1, resident - {evicted} | {expert}) for evicted in resident)

    return fewest(0, frozenset(initial))


def fewest_of_all(batches, size, initial):
    """Every choice of whom to keep after a batch."""

    @cache
    def fewest(number, resident):
        if number == len(batches):
            return 0
        batch = frozenset(batches[number])
        everyone = sorted(resident | batch)
        kept = combinations(everyone, min(size, len(everyone)))
        return len(batch - resident) + min(fewest(number + 1, frozenset(choice)) for choice in kept)

    return fewest(0, frozenset(initial))


SMALL = st.lists(st.lists(st.integers(0, 4), unique=True, max_size=5), max_size=6)


@examples(150)
@given(SMALL, st.integers(1, 4), st.integers(0, 4))
def test_min_is_the_fewest_that_any_schedule_has(batches, size, started):
    initial = range(min(size, started))
    assert minimum_misses(batches, size, "ascending", initial) == fewest_of_an_order(batches, size, initial)
    assert minimum_misses(batches, size, "resident-first", initial) == fewest_of_all(batches, size, initial)


@pytest.mark.parametrize(("policy", "order"), PAIRS)
@examples(100)
@given(BATCHES, st.integers(1, EXPERTS))
def test_no_policy_beats_min(policy, order, batches, size):
    buffer = Buffer(size, policy, order, range(size))
    misses = sum(not access.hit for batch in batches for access in buffer.run(batch))
    assert misses >= minimum_misses(batches, size, order, range(size))
    assert misses >= minimum_misses(batches, size, "resident-first", range(size))


def misses_per_batch(policy, order, size=2, experts=4):
    """All experts active in every batch, once the start is over."""
    buffer = Buffer(size, policy, order, range(size))
    return [sum(not access.hit for access in buffer.run(range(experts))) for _ in range(6)][-1]


def test_what_the_two_orders_mean_when_every_expert_is_active():
    """By hand, 4 experts in 2 places: a clock that LIFO keeps a place of and FIFO none; resident first keeps both."""
    assert [misses_per_batch(policy, "ascending") for policy in POLICIES] == [3, 4, 4, 4]
    assert [misses_per_batch(policy, "resident-first") for policy in POLICIES] == [2, 2, 2, 2]


def test_lfu_forgets_an_old_domain():
    buffer = Buffer(2, "lfu", "resident-first")
    for batch in [[0, 1]] * 200 + [[2, 3]] * 30:
        buffer.run(batch)
    for _ in range(30):
        buffer.run([4])  # evicts one of the idle two
        buffer.run([2, 3])
    assert 0 not in buffer.resident and 1 not in buffer.resident


@pytest.mark.parametrize(("arguments", "words"), [
    ((0, "lru", "ascending"), "size must be at least 1, got 0"),
    ((2, "mru", "ascending"), "policy must be one of lifo, fifo, lru, lfu, got 'mru'"),
    ((2, "lru", "falling"), "order must be one of resident-first, ascending, got 'falling'"),
    ((2, "lru", "ascending", [1, 1]), r"at most 2 different experts, got \[1, 1\]"),
    ((2, "lru", "ascending", [1, 2, 3]), r"at most 2 different experts, got \[1, 2, 3\]"),
])
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Buffer(*arguments)
    if words.startswith("order"):
        with pytest.raises(ValueError, match=words):
            minimum_misses([], 2, "falling")


def test_a_policy_is_one_line(monkeypatch):
    """Its name is known wherever there is a choice of policies."""
    monkeypatch.setitem(POLICIES, "smallest", lambda history, expert: (-expert,))
    buffer = Buffer(2, "smallest", "ascending", initial=[1, 2])
    assert [access.evicted for access in buffer.run([0])] == [1]
    with pytest.raises(ValueError, match="policy must be one of lifo, fifo, lru, lfu, smallest, got 'largest'"):
        Buffer(2, "largest", "ascending")
