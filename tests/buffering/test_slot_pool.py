"""Several layers in one pool: the resident results whatever is announced and called when, and never a standstill."""

from __future__ import annotations

import random
import time
import weakref

import pytest
import torch
from buffer_makers import HIDDEN_DIM, MODEL_DIM, make_store, resident_experts
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES, Buffer
from fairseq_moe_ext.buffering.slot_pool import STAGING_SLOTS, SlotPool
from fairseq_moe_ext.buffering.store import HostStore

EXPERTS = 6


class SlowStore(HostStore):
    """Each load takes a time of its own, so that copies land in any order; some fail where `broken` says so."""

    readers = 4

    def __init__(self, weights, dtype, seed=0, broken=()):
        super().__init__(weights, dtype)
        self._random, self.broken, self.order = random.Random(seed), broken, []

    def load(self, expert, targets):
        self.order.append(expert)
        time.sleep(self._random.random() / 2000)
        if expert in self.broken:
            targets[0].fill_(float("nan"))  # half written
            raise OSError(f"expert {expert} is gone")
        return super().load(expert, targets)


def layers_in_one_pool(sizes, policy="lfu", order="resident-first", make=SlowStore):
    """The layers and their resident twins."""
    twins = [resident_experts(EXPERTS, seed=number) for number in range(len(sizes))]
    layers = []
    for twin in twins:
        layer = BufferedExperts(
            EXPERTS, MODEL_DIM, HIDDEN_DIM, twin.activation, make_store=make, policy=policy, order=order
        )
        layer.eval().load_state_dict(twin.state_dict())
        layers.append(layer)
    kept = {number: (size, EXPERTS) for number, size in enumerate(sizes)}
    pool = SlotPool(layers[0].format, kept, layers[0].like, layers[0].readers)
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        layer.start(size, pool=pool, key=number)
    return layers, twins


def rows_for(counts):
    return torch.randn(sum(counts), MODEL_DIM, generator=torch.Generator().manual_seed(sum(counts)))


def assert_call(layer, twin, counts):
    rows = rows_for(counts)
    with torch.no_grad():
        assert torch.equal(layer(rows, counts), twin(rows, counts))


COUNTS = st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS)


@examples(120)
@given(
    st.lists(st.integers(1, EXPERTS), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), COUNTS, st.booleans()), max_size=12),
    st.sampled_from(sorted(POLICIES)), st.sampled_from(ORDERS),
)  # fmt: skip
def test_any_announcements_and_calls(sizes, events, policy, order):
    """An event: a layer, its counts, and whether it is only announced; all that was announced is called in the end."""
    layers, twins = layers_in_one_pool(sizes, policy, order)
    twin_buffers = [Buffer(size, policy, order, range(size)) for size in sizes]
    announced = {}
    for number, counts, only_announced in events:
        number %= len(sizes)
        if number in announced:
            continue
        layers[number].prefetch(counts)
        announced[number] = counts
        if not only_announced:
            assert_call(layers[number], twins[number], announced.pop(number))
            turns = twin_buffers[number].run(expert for expert, count in enumerate(counts) if count)
            assert layers[number].last_call.misses == sum(not turn.hit for turn in turns)
            assert layers[number].resident_experts == list(twin_buffers[number].resident)
    for number, counts in reversed(announced.items()):
        assert_call(layers[number], twins[number], counts)
    held = sum(len(layer._seat.held) for layer in layers)
    assert held == sum(sizes)  # whoever was on its way has arrived or gave its slot back


def test_the_slots_of_all_layers_and_no_more():
    layers, _ = layers_in_one_pool([1, 2, 3])
    assert sum(layer.resident_bytes for layer in layers) == (6 + STAGING_SLOTS) * layers[0].expert_bytes
    assert len({layer.pool for layer in layers}) == 1 and layers[0].pool.num_slots == 6 + STAGING_SLOTS
    whole, _ = layers_in_one_pool([EXPERTS, EXPERTS])
    assert sum(layer.resident_bytes for layer in whole) == 2 * EXPERTS * layers[0].expert_bytes


def test_most_rows_are_read_first():
    layers, twins = layers_in_one_pool([2])
    (layer,) = layers
    layer._store.order.clear()
    assert_call(layer, twins[0], [1, 0, 1, 5, 2, 9])
    started = layer._store.order
    assert sorted(started) == [2, 3, 4, 5] and started[0] in (5, 3)  # four threads begin at once
    assert layer.last_call.misses == 4


def test_one_reader_reads_in_the_order_of_rows():
    class OneReader(SlowStore):
        readers = 1

    layers, twins = layers_in_one_pool([2], make=OneReader)
    layers[0]._store.order.clear()
    assert_call(layers[0], twins[0], [1, 0, 1, 5, 2, 9])
    assert layers[0]._store.order == [5, 3, 4, 2]


@pytest.mark.parametrize("order", ORDERS)
def test_an_error_in_one_layer_leaves_the_others_and_itself_right(order):
    layers, twins = layers_in_one_pool([1, 2], order=order)
    everything = [1] * EXPERTS
    layers[1].prefetch([0, 1, 1, 0, 1, 1])
    layers[0]._store.broken = (3,)
    with pytest.raises(OSError, match="expert 3 is gone"):
        layers[0](rows_for(everything), everything)
    assert_call(layers[1], twins[1], [0, 1, 1, 0, 1, 1])
    layers[0]._store.broken = ()
    for layer, twin in zip(layers, twins, strict=True):
        assert_call(layer, twin, everything)


def test_what_others_announce_leaves_a_layer_its_own_slots():
    """An emptied layer is called while two others have announced more than all that is free."""
    layers, twins = layers_in_one_pool([1, 3, 1])
    everything = [1] * EXPERTS
    layers[1]._store.broken = (4,)
    with pytest.raises(OSError, match="expert 4 is gone"):
        layers[1](rows_for(everything), everything)
    layers[1]._store.broken = ()
    layers[0].prefetch(everything)
    layers[2].prefetch(everything)
    for number in (1, 2, 0):
        assert_call(layers[number], twins[number], everything)


def test_a_move_takes_all_layers_along():
    layers, twins = layers_in_one_pool([1, 2])
    model, twin = torch.nn.ModuleList(layers), torch.nn.ModuleList(twins)
    for dtype in (torch.float64, torch.float16, torch.float32):
        layers[1].prefetch([1] * EXPERTS)
        model.to(dtype), twin.to(dtype)
        for layer, resident in zip(layers[::-1], twins[::-1], strict=True):
            rows = rows_for([1] * EXPERTS).to(dtype)
            with torch.no_grad():
                assert torch.equal(layer(rows, [1] * EXPERTS), resident(rows, [1] * EXPERTS))


def test_layers_leave_one_after_the_other():
    layers, twins = layers_in_one_pool([1, 2])
    pool = layers[0].pool
    layers[0].stop()
    assert_call(layers[1], twins[1], [1] * EXPERTS)
    layers[1].stop()
    assert not pool._lanes and layers[0].resident_bytes == layers[1].resident_bytes == 0


def test_what_was_stopped_has_no_slots():
    layers, _ = layers_in_one_pool([1, 2])
    pool = weakref.ref(layers[0].pool)
    for layer in layers:
        layer.stop()
    assert pool() is None


def test_an_error_after_a_move_is_the_error_that_is_told():
    """A layer that was announced cannot fill its slots again, which the other one has moved."""
    layers, twins = layers_in_one_pool([1, 2])
    layers[1].prefetch([1] * EXPERTS)
    layers[0].share_memory()
    layers[1]._store.broken = tuple(range(EXPERTS))
    with pytest.raises(OSError, match="is gone"):
        layers[1](rows_for([1] * EXPERTS), [1] * EXPERTS)
    assert not layers[1].is_started
    assert_call(layers[0], twins[0], [1] * EXPERTS)


def test_layers_read_from_files(tmp_path):
    def make(weights, dtype):
        return make_store("file", tmp_path, weights, dtype, range(EXPERTS))

    layers, twins = layers_in_one_pool([1, 3, 2], make=make)
    for counts in ([1] * EXPERTS, [0, 1, 0, 2, 0, 3], [3, 0, 0, 0, 0, 0]):
        for layer, twin in zip(layers, twins, strict=True):
            assert_call(layer, twin, counts)
