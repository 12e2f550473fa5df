"""A started buffer's model goes to another dtype or device, also between a call and its prefetch."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from buffer_makers import STORES, buffered_twin, make_store, resident_experts

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.host_tier import HostTier
from fairseq_moe_ext.buffering.store import FileStore, HostStore, LazyTensors
from fairseq_moe_ext.experts.resident import ResidentExperts

COUNTS = [1, 0, 2, 1, 1, 1]
MOVES = {
    "to": lambda module, number: module.to((torch.float64, torch.float32)[number % 2]),
    "half": lambda module, number: (module.half, module.float)[number % 2](),
    "bfloat16": lambda module, number: (module.bfloat16, module.double)[number % 2](),
    "nowhere": lambda module, number: module.to(torch.float32),
    "share_memory": lambda module, number: module.share_memory(),
}


def rows_for(counts, dtype=torch.float32, model_dim=6):
    return torch.randn(sum(counts), model_dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def experts_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("experts")}


@pytest.mark.parametrize("move", MOVES)
def test_moves_while_copies_are_under_way(move):
    """Experts so large that the copies of a prefetch have not ended when the model moves."""
    torch.manual_seed(0)
    resident = ResidentExperts(6, 64, 2048).eval().requires_grad_(False)
    buffered = BufferedExperts(6, 64, 2048, make_store=HostStore, policy="lru", order="resident-first").eval()
    buffered.load_state_dict(resident.state_dict())
    buffered.start(2)
    for number in range(20):
        counts = COUNTS[number % 6 :] + COUNTS[: number % 6]
        buffered.prefetch(counts)
        MOVES[move](buffered, number), MOVES[move](resident, number)
        rows = rows_for(counts, resident.dtype, 64)
        assert torch.equal(buffered(rows, counts), resident(rows, counts)), number


@pytest.mark.parametrize("prefetched", [True, False])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("move", MOVES)
def test_hits_and_outputs_are_those_of_a_model_that_stays(tmp_path, store, move, prefetched):
    resident, still = resident_experts(6), buffered_twin(resident_experts(6), 3)
    buffered = buffered_twin(resident, 3, store, tmp_path)
    for number in range(4):
        counts = COUNTS[number:] + COUNTS[:number]
        still(rows_for(counts), counts)
        if prefetched:
            buffered.prefetch(counts)
        MOVES[move](buffered, number), MOVES[move](resident, number)
        rows = rows_for(counts, resident.dtype)
        assert torch.equal(buffered(rows, counts), resident(rows, counts))
        assert (buffered.last_call.hits, buffered.last_call.misses) == (still.last_call.hits, still.last_call.misses)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("prefetched", [True, False])
def test_outputs_are_the_resident_ones_after_the_meta_device(tmp_path, store, prefetched):
    resident = resident_experts(6)
    buffered = buffered_twin(resident, 2, store, tmp_path)
    if prefetched:
        buffered.prefetch(COUNTS)
    buffered.to("meta").to_empty(device="cpu")
    assert torch.equal(buffered(rows_for(COUNTS), COUNTS), resident(rows_for(COUNTS), COUNTS))


def test_main_memory_stands_before_a_device_as_long_as_the_model_is_there(tmp_path):
    """The model moves after the start; however often it starts, there is one tier."""
    resident = resident_experts(6)
    buffered = buffered_twin(resident, 2, "file", tmp_path)
    for _ in range(2):
        buffered.start(2, host_capacity=3)
        assert isinstance(buffered._source, FileStore)
        buffered.to("meta")
        assert isinstance(buffered._source, HostTier) and isinstance(buffered._source._below, FileStore)
        buffered.start(2, host_capacity=3)
        assert isinstance(buffered._source, HostTier) and isinstance(buffered._source._below, FileStore)
        buffered.to_empty(device="cpu")
    assert torch.equal(buffered(rows_for(COUNTS), COUNTS), resident(rows_for(COUNTS), COUNTS))


def test_a_move_that_fails_asks_for_another_start():
    resident = resident_experts(6)
    buffered = buffered_twin(resident, 2)
    buffered.prefetch(COUNTS)

    def fails(tensor):
        raise torch.OutOfMemoryError("no memory there")

    with pytest.raises(torch.OutOfMemoryError):
        buffered._apply(fails)
    with pytest.raises(RuntimeError, match="must be started before they are called"):
        buffered(rows_for(COUNTS), COUNTS)
    buffered.start(2)
    assert torch.equal(buffered(rows_for(COUNTS), COUNTS), resident(rows_for(COUNTS), COUNTS))


def test_other_weights_while_copies_are_under_way():
    first, second = resident_experts(6), resident_experts(6, seed=1)
    buffered = buffered_twin(first, 2)
    buffered.prefetch(COUNTS)
    buffered.load_state_dict(second.state_dict())
    buffered.start(2)
    assert torch.equal(buffered(rows_for(COUNTS), COUNTS), second(rows_for(COUNTS), COUNTS))


class Unreadable(LazyTensors):
    fails = False

    def fill(self, expert, part, target):
        if self.fails:
            raise OSError("gone")
        return super().fill(expert, part, target)


@pytest.mark.parametrize("prefetched", [True, False])
def test_a_store_that_fails_during_a_move(prefetched):
    resident, sources = resident_experts(6), []

    def make(weights, dtype):
        sources.append(Unreadable(weights))
        return FileStore(sources[0], dtype)

    buffered = BufferedExperts(6, 6, 5, torch.tanh, make_store=make, policy="lru", order="ascending").eval()
    buffered.load_state_dict(resident.state_dict())
    buffered.start(2)
    if prefetched:
        buffered.prefetch(COUNTS)
    sources[0].fails = True
    with pytest.raises(OSError, match="gone"):
        buffered.double()
    sources[0].fails = False
    with pytest.raises(RuntimeError, match="must be started before they are called"):
        buffered(rows_for(COUNTS, torch.float64), COUNTS)
    buffered.start(2)
    rows = rows_for(COUNTS, torch.float64)
    assert torch.equal(buffered(rows, COUNTS), resident.double()(rows, COUNTS))


def test_threads_end_with_their_experts():
    gc.collect()
    before = experts_threads()
    buffered = buffered_twin(resident_experts(6), 2)
    for _ in range(3):
        buffered.start(2)
        buffered.prefetch(COUNTS)
        buffered.double().float()
        assert len(experts_threads() - before) <= 1
    buffered.stop()
    assert not experts_threads() - before
    buffered.start(2)
    buffered.prefetch(COUNTS)
    (thread,) = experts_threads() - before
    del buffered
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("prefetched", [True, False])
def test_a_started_model_goes_to_a_gpu_and_back(tmp_path, store, prefetched):
    resident = resident_experts(6)

    def make(weights, dtype):
        return make_store(store, tmp_path, weights, dtype, resident.local)

    buffered = BufferedExperts(6, 6, 5, torch.tanh, make_store=make, policy="lru", order="resident-first").eval()
    buffered.load_state_dict(resident.state_dict())
    buffered.start(2, host_capacity=None if store in ("host", "tier") else 2)
    for device in ("cuda", "cpu", "cuda"):
        if prefetched:
            buffered.prefetch(COUNTS)
        buffered.to(device), resident.to(device)
        rows = rows_for(COUNTS).to(device)
        torch.testing.assert_close(buffered(rows, COUNTS), resident(rows, COUNTS))
        state = buffered.state_dict()
        assert all(torch.equal(state[key], value) for key, value in resident.state_dict().items())
