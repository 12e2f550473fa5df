"""Buffered experts compute what resident ones do, bit by bit, whatever the buffer; and fail loudly or not at all."""

import threading

import pytest
import torch
from activations import ACTIVATIONS
from buffer_makers import STORES, buffered_twin, make_store, resident_experts
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import FEW_ROWS

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES, Buffer
from fairseq_moe_ext.buffering.slot_pool import STAGING_SLOTS
from fairseq_moe_ext.buffering.store import HostStore
from fairseq_moe_ext.experts.resident import ResidentExperts

PAIRS = [(policy, order) for policy in POLICIES for order in ORDERS]


def random_batches(experts: int, number: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (number, experts), generator=generator)
    return (counts * (torch.rand(number, experts, generator=generator) < 0.6)).tolist()


def rows_for(counts, dtype=torch.float32):
    return torch.randn(sum(counts), 6, generator=torch.Generator().manual_seed(len(counts))).to(dtype)


def assert_same_outputs(buffered, resident, batches, dtype=torch.float32):
    for counts in batches:
        rows = rows_for(counts, dtype)
        with torch.no_grad():
            assert torch.equal(buffered(rows, counts), resident(rows, counts))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("policy", "order"), PAIRS)
def test_outputs_are_the_resident_ones_for_every_size(tmp_path, store, policy, order):
    resident = resident_experts(7)
    batches = [[0] * 7, [2] * 7, *random_batches(7, 12, seed=1), [0] * 7]
    for size in range(1, 8):
        buffered = buffered_twin(resident, size, store, tmp_path, policy, order)
        assert_same_outputs(buffered, resident, batches)


@examples(60)
@given(
    st.integers(1, 9), st.data(), st.sampled_from(PAIRS), st.sampled_from(("host", "lazy")),
    st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)), st.integers(0, 1000),
)
def test_outputs_and_counts_of_random_buffers(num_experts, data, pair, store, dtype, seed):
    size = data.draw(st.integers(1, num_experts))
    resident = resident_experts(num_experts, dtype)
    buffered = buffered_twin(resident, size, store, None, *pair, dtype=dtype)
    decisions = Buffer(size, *pair, range(size))
    for counts in random_batches(num_experts, 5, seed):
        rows = rows_for(counts, dtype)
        with torch.no_grad():
            assert torch.equal(buffered(rows, counts), resident(rows, counts))
        turns = decisions.run(expert for expert, count in enumerate(counts) if count)
        misses = sum(not turn.hit for turn in turns)
        call = buffered.last_call
        assert (call.hits, call.misses) == (len(turns) - misses, misses)
        assert call.bytes_copied == misses * buffered.expert_bytes
        assert call.host_reads + call.disk_reads == misses
    assert buffered.resident_bytes == min(size + STAGING_SLOTS, num_experts) * buffered.expert_bytes
    assert buffered.total_bytes == resident.total_bytes == num_experts * buffered.expert_bytes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_outputs_are_the_resident_ones_for_every_activation(name, dtype, threads):
    """Also of more rows than the kernel for few takes, and with threads that share the experts."""
    resident = resident_experts(7, dtype, activation=ACTIVATIONS[name])
    batches = [[FEW_ROWS + 12, 0, 3, FEW_ROWS, FEW_ROWS + 1, 1, 2], *random_batches(7, 5, seed=4)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in (1, 3):
            assert_same_outputs(buffered_twin(resident, size, dtype=dtype), resident, batches, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("prefetched", [True, False])
def test_a_share_of_the_experts(tmp_path, prefetched):
    """Counts are those of the local experts; a ranking by global number sees only them."""
    resident = resident_experts(9, local=(2, 3, 7))
    buffered = buffered_twin(resident, 1, "file", tmp_path, ranking=[8, 7, 2, 0, 3])
    for counts in ([0, 0, 2], [1, 2, 0], [1, 1, 1]):
        rows = rows_for(counts)
        if prefetched:
            buffered.prefetch(counts)
        assert torch.equal(buffered(rows, counts), resident(rows, counts))
        if counts == [0, 0, 2]:
            assert (buffered.last_call.hits, buffered.last_call.misses) == (1, 0)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "way", [(torch.float32, torch.float16), (torch.float32, torch.float16, torch.float32), (torch.bfloat16,),
            (torch.float16, torch.bfloat16, torch.float64)]
)
@pytest.mark.parametrize("started", [True, False])
def test_outputs_are_the_resident_ones_after_changes_of_dtype(tmp_path, store, way, started):
    """The weights come in float32 into a model of the way's first dtype, which then goes on."""
    source = resident_experts(5)
    resident = ResidentExperts(5, 6, 5, torch.tanh).to(way[0]).eval()
    resident.load_state_dict(source.state_dict())
    buffered = buffered_twin(source, 2, store, tmp_path, dtype=way[0])
    for dtype in way[1:]:
        resident, buffered = resident.to(dtype), buffered.to(dtype)
        if started:
            assert_same_outputs(buffered, resident, random_batches(5, 3, seed=2), dtype)
    assert_same_outputs(buffered, resident, random_batches(5, 8, seed=3), way[-1])
    assert buffered.pool.fc1_weight.dtype == way[-1]
    assert buffered.total_bytes == resident.total_bytes


@pytest.mark.parametrize("store", STORES)
def test_the_state_dict_is_the_resident_ones(tmp_path, store):
    resident = resident_experts(4)
    state = buffered_twin(resident, 2, store, tmp_path).state_dict()
    assert list(state) == list(sorted(state, key=list(state).index)) and set(state) == set(resident.state_dict())
    for key, value in resident.state_dict().items():
        assert torch.equal(state[key], value), key


def test_other_weights_ask_for_another_start():
    first, second = resident_experts(4), resident_experts(4, seed=1)
    buffered = buffered_twin(first, 2)
    buffered.load_state_dict(second.state_dict())
    with pytest.raises(RuntimeError, match="must be started"):
        buffered(torch.zeros(1, 6), [1, 0, 0, 0])
    buffered.start(3)
    assert_same_outputs(buffered, second, random_batches(4, 5, seed=0))


@pytest.mark.parametrize("change, words", [
    ({"1.fc2.bias": None}, r'Missing key\(s\) in state_dict: "1\.fc2\.bias"'),
    ({"9.fc1.weight": torch.zeros(5, 6)}, r'Unexpected key\(s\) in state_dict: "9\.fc1\.weight"'),
    ({"0.fc3.weight": torch.zeros(5, 6)}, r'Unexpected key\(s\) in state_dict: "0\.fc3\.weight"'),
    ({"3.fc1.weight": torch.zeros(7, 6)}, r"3\.fc1\.weight: expected shape \(5, 6\), got \(7, 6\)"),
])
def test_bad_keys_are_named(change, words):
    state = {**resident_experts(4).state_dict(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(RuntimeError, match=words):
        buffered_twin(resident_experts(4), 2).load_state_dict(state)


class GatedStore:
    """A host store whose every load waits for a signal."""

    def __init__(self, store, let: threading.Semaphore):
        self._store, self._let = store, let

    def load(self, expert, targets):
        if not self._let.acquire(timeout=20):
            raise TimeoutError(f"nothing computed while expert {expert} was on its way")
        return self._store.load(expert, targets)

    def convert(self, dtype):
        self._store.convert(dtype)

    def prepare(self, device):
        self._store.prepare(device)


@pytest.mark.parametrize(("order", "size", "counts"), [
    ("resident-first", 1, [1, 1, 1, 1, 1]),
    ("resident-first", 3, [1, 1, 1, 1, 1]),
    ("ascending", 2, [1, 1, 1, 1, 1]),
])
def test_copies_and_computation_go_on_at_once(order, size, counts):
    """After the start, a copy may only begin when an expert's row has: without overlap nothing would move."""
    resident = resident_experts(5)
    let = threading.Semaphore(size)  # what the start takes

    def activation(hidden):
        let.release()
        return torch.tanh(hidden)

    def gated(weights, dtype):
        return GatedStore(HostStore(weights, dtype), let)

    buffered = BufferedExperts(5, 6, 5, activation, make_store=gated, policy="lifo", order=order).eval()
    buffered.load_state_dict(resident.state_dict())
    buffered.start(size)
    rows = rows_for(counts)
    assert torch.equal(buffered(rows, counts), resident(rows, counts))
    assert buffered.last_call.misses >= 2


class FailingStore(GatedStore):
    """A host store that fails at one expert, as long as it is told to."""

    def __init__(self, store):
        self._store, self.fails_at = store, None

    def load(self, expert, targets):
        if expert == self.fails_at:
            targets[0].fill_(float("nan"))  # half written
            raise OSError(f"expert {expert} is gone")
        return self._store.load(expert, targets)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fails_at", range(6))
def test_an_error_while_reading_leaves_nothing_wrong_behind(order, fails_at):
    resident = resident_experts(6)
    stores = []

    def failing(weights, dtype):
        stores.append(FailingStore(HostStore(weights, dtype)))
        return stores[-1]

    buffered = BufferedExperts(6, 6, 5, torch.tanh, make_store=failing, policy="lru", order=order).eval()
    buffered.load_state_dict(resident.state_dict())
    buffered.start(2)
    batches = random_batches(6, 6, seed=5)
    for counts in [[1] * 6, *batches]:
        stores[0].fails_at = fails_at
        try:
            outputs = buffered(rows_for(counts), counts)
        except OSError as error:
            assert str(error) == f"expert {fails_at} is gone"
        else:
            assert torch.equal(outputs, resident(rows_for(counts), counts))
        stores[0].fails_at = None
        assert_same_outputs(buffered, resident, [counts])


def test_a_call_that_was_prefetched_and_never_came():
    resident = resident_experts(5)
    buffered = buffered_twin(resident, 2)
    for counts in random_batches(5, 6, seed=6):
        buffered.prefetch([1, 1, 1, 1, 0])
        buffered.prefetch(counts)
        assert torch.equal(buffered(rows_for(counts), counts), resident(rows_for(counts), counts))


def test_misuse_is_named():
    resident = resident_experts(4)
    fresh = BufferedExperts(4, 6, 5, make_store=make_store, policy="lru", order="ascending")
    for call in (lambda: fresh.start(2), fresh.state_dict):
        with pytest.raises(RuntimeError, match="have no weights before load_state_dict"):
            call()
    with pytest.raises(RuntimeError, match="must be started before they are called"):
        fresh.eval()(torch.zeros(1, 6), [1, 0, 0, 0])
    buffered = buffered_twin(resident, 2)
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"from 1 to the 4 experts, got {size}"):
            buffered.start(size)
    buffered.prefetch([1, 0, 0, 0])
    with pytest.raises(ValueError, match=r"counts that were prefetched, \[1, 0, 0, 0\], got \[0, 1, 0, 0\]"):
        buffered(torch.zeros(1, 6), [0, 1, 0, 0])
    with pytest.raises(RuntimeError, match="cannot be trained"):
        buffered.train()(torch.zeros(1, 6), [1, 0, 0, 0])
    with pytest.raises(ValueError, match="must sum to the 5 rows, got"):
        buffered.eval()(torch.zeros(5, 6), [1, 1, 1, 0])
