"""Copies before their call: the same results and misses, and none that is needed waits for more than one of them."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from buffer_makers import HIDDEN_DIM, MODEL_DIM, resident_experts
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES, Buffer
from fairseq_moe_ext.buffering.habits import Habits, in_order
from fairseq_moe_ext.buffering.slot_pool import STAGING_SLOTS, SlotPool, ahead_slots
from fairseq_moe_ext.buffering.store import HostStore

EXPERTS = 6
EVERYTHING = [1] * EXPERTS


class Recorded(HostStore):
    """Says what was read, and waits as it is told to."""

    def __init__(self, weights, dtype, seed=0):
        super().__init__(weights, dtype)
        self.order, self.broken, self.pause = [], (), random.Random(seed)
        self.open = threading.Event()
        self.open.set()

    def load(self, expert, targets):
        self.order.append(expert)
        assert self.open.wait(timeout=60)
        time.sleep(self.pause.random() / 2000)
        if expert in self.broken:
            raise OSError(f"expert {expert} is gone")
        return super().load(expert, targets)


def chain(sizes, ahead=4, policy="lfu", order="resident-first"):
    """Layers that are called one after another and look ahead, with their resident twins."""
    twins = [resident_experts(EXPERTS, seed=number) for number in range(len(sizes))]
    layers = [
        BufferedExperts(
            EXPERTS, MODEL_DIM, HIDDEN_DIM, twin.activation, make_store=Recorded, policy=policy, order=order
        ).eval()
        for twin in twins
    ]
    for layer, twin in zip(layers, twins, strict=True):
        layer.load_state_dict(twin.state_dict())
    kept = {number: (size, EXPERTS) for number, size in enumerate(sizes)}
    pool = SlotPool(layers[0].format, kept, layers[0].like, ahead=ahead)
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        layer.start(size, pool=pool, key=number)
        layer.precede(layers[(number + 1) % len(layers)])
    return layers, twins


def assert_call(layer, twin, counts):
    rows = torch.randn(sum(counts), MODEL_DIM, generator=torch.Generator().manual_seed(sum(counts)))
    with torch.no_grad():
        assert torch.equal(layer(rows, counts), twin(rows, counts))


def wait_until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


COUNTS = st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS)


@examples(80)
@given(
    st.lists(st.integers(1, EXPERTS), min_size=2, max_size=3), st.lists(COUNTS, max_size=12), st.integers(1, 5),
    st.sampled_from(sorted(POLICIES)), st.sampled_from(ORDERS), st.booleans(),
)  # fmt: skip
def test_results_and_misses_are_those_without(sizes, calls, ahead, policy, order, announced):
    layers, twins = chain(sizes, ahead, policy, order)
    buffers = [Buffer(size, policy, order, range(size)) for size in sizes]
    for number, counts in enumerate(calls):
        number %= len(sizes)
        if announced:
            layers[number].prefetch(counts)
        assert_call(layers[number], twins[number], counts)
        turns = buffers[number].run(expert for expert, count in enumerate(counts) if count)
        call = layers[number].last_call
        assert (call.hits, call.misses) == (sum(turn.hit for turn in turns), sum(not turn.hit for turn in turns))
        assert call.bytes_copied == (call.misses + call.prefetched_in_vain) * layers[number].expert_bytes
        assert 0 <= call.prefetched <= call.misses
    for layer in layers:
        layer._ahead.settle()
    assert sum(len(layer._seat.held) for layer in layers) == sum(sizes) and not layers[0].pool.ahead.held


def test_what_is_nearly_always_wanted_is_there_before_the_call():
    layers, twins = chain([2, 2])
    for number in range(8):
        for layer, twin in zip(layers, twins, strict=True):
            assert_call(layer, twin, EVERYTHING)
            assert (layer.last_call.misses, layer.last_call.prefetched_in_vain) == (4, 0)
            assert number <= 4 or layer.last_call.prefetched == 4
            (following,) = layer._following
            wait_until(lambda: all(copy.done() for _, copy in following._ahead._copies.values()))  # noqa: B023


def test_needed_copies_hold_the_queue_of_those_ahead():
    """Of three layers in a ring the first one's queue stands while the third one misses."""
    layers, twins = chain([2, 2, 2], ahead=4)
    for _ in range(6):
        for layer, twin in zip(layers, twins, strict=True):
            assert_call(layer, twin, EVERYTHING)
    layers[0]._ahead.settle()
    layers[0]._store.open.clear()
    layers[0]._store.order.clear()
    layers[0].look_ahead()
    wait_until(lambda: layers[0]._store.order)
    assert len(layers[0]._ahead._copies) == 4
    assert_call(layers[1], twins[1], [2, 1, 1, 1, 1, 3])
    assert len(layers[0]._ahead._copies) == len(layers[0]._store.order) == 1
    layers[0]._store.open.set()
    assert_call(layers[0], twins[0], EVERYTHING)


def test_a_needed_copy_waits_for_none_of_them():
    """The other layer's store hangs in a copy ahead; what this one needs goes by."""
    layers, twins = chain([2, 2])
    for _ in range(6):
        for layer, twin in zip(layers, twins, strict=True):
            assert_call(layer, twin, EVERYTHING)
    layers[1]._store.open.clear()
    layers[1]._store.order.clear()
    assert_call(layers[0], twins[0], EVERYTHING)
    wait_until(lambda: layers[1]._store.order)
    assert_call(layers[0], twins[0], [0, 2, 1, 1, 1, 3])
    assert len(layers[1]._store.order) == 1  # one at a time
    layers[1]._store.open.set()
    assert_call(layers[1], twins[1], EVERYTHING)


def test_those_in_vain_are_counted_and_their_slots_come_back():
    layers, twins = chain([1, 1])
    for _ in range(8):
        for layer, twin in zip(layers, twins, strict=True):
            assert_call(layer, twin, EVERYTHING)
    assert_call(layers[0], twins[0], EVERYTHING)
    wait_until(lambda: all(copy.done() for _, copy in layers[1]._ahead._copies.values()))
    begun = set(layers[1]._ahead._copies)
    counts = [int(expert not in begun) for expert in range(EXPERTS)]
    assert begun and any(counts)
    assert_call(layers[1], twins[1], counts)
    assert layers[1].last_call.prefetched == 0 and layers[1].last_call.prefetched_in_vain == len(begun)
    assert not [slot for slot, _ in layers[1]._ahead._unwanted]


def test_an_error_ahead_is_raised_where_the_expert_is_wanted():
    layers, twins = chain([2, 2])
    for _ in range(6):
        for layer, twin in zip(layers, twins, strict=True):
            assert_call(layer, twin, EVERYTHING)
    layers[1]._store.broken = tuple(range(EXPERTS))
    assert_call(layers[0], twins[0], EVERYTHING)
    wait_until(lambda: any(copy.done() for _, copy in layers[1]._ahead._copies.values()))
    with pytest.raises(OSError, match="is gone"):
        layers[1](torch.zeros(EXPERTS, MODEL_DIM), EVERYTHING)
    layers[1]._store.broken = ()
    for layer, twin in zip(layers, twins, strict=True):
        assert_call(layer, twin, EVERYTHING)


def test_a_model_moves_while_copies_ahead_are_under_way():
    layers, twins = chain([1, 2])
    model, twin = torch.nn.ModuleList(layers), torch.nn.ModuleList(twins)
    for dtype in (torch.float64, torch.float32, torch.float16):
        for _ in range(6):
            for layer, resident in zip(layers, twins, strict=True):
                rows = torch.randn(EXPERTS, MODEL_DIM).to(layer.dtype)
                with torch.no_grad():
                    assert torch.equal(layer(rows, EVERYTHING), resident(rows, EVERYTHING))
        model.to(dtype), twin.to(dtype)
    model.share_memory()
    for layer, resident in zip(layers, twins, strict=True):
        rows = torch.randn(EXPERTS, MODEL_DIM).half()
        with torch.no_grad():
            assert torch.equal(layer(rows, EVERYTHING), resident(rows, EVERYTHING))


def test_habits_by_hand():
    habits = Habits(3)
    assert habits.likely() == []
    for rows in ([4, 1, 0], [4, 9, 0], [4, 9, 0], [4, 9, 0], [4, 9, 1]):
        habits.add(rows)
    assert habits.likely() == [1, 0]
    for _ in range(4):
        habits.add([0, 1, 0])
    assert habits.likely() == [1]


def test_bytes():
    layers, _ = chain([2, 2], ahead=3)
    assert sum(layer.resident_bytes for layer in layers) == (4 + STAGING_SLOTS + 3) * layers[0].expert_bytes
    assert [ahead_slots(kept) for kept in ([(2, 6)], [(16, 64), (16, 64)], [(6, 6)], [(8, 9)])] == [1, 4, 0, 1]


def test_the_order_of_layers():
    assert in_order(["decoder.0", "decoder.1"]) == {"decoder.0": ["decoder.1"], "decoder.1": ["decoder.0"]}
    assert in_order(["encoder.1", "decoder.1", "decoder.3"]) == {
        "encoder.1": ["decoder.1"], "decoder.1": ["decoder.3", "encoder.1"], "decoder.3": ["decoder.1", "encoder.1"],
    }  # fmt: skip
    assert in_order(["encoder.1"]) == {"encoder.1": ["encoder.1"]} and in_order(["decoder.1"]) == {"decoder.1": []}
