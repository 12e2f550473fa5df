"""On a GPU: copies on a stream of their own, pinned memory, and the tiers; results as the resident experts'."""

import itertools

import pytest
import torch
from buffer_makers import STORES, buffered_twin, make_store, resident_experts

from fairseq_moe_ext.buffering import host_tier
from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.eviction import ORDERS
from fairseq_moe_ext.buffering.host_tier import HostTier
from fairseq_moe_ext.buffering.slot_pool import STAGING_SLOTS
from fairseq_moe_ext.buffering.store import FileStore, HostStore, LazyTensors, pin

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(resident, size, store, folder, order):
    """Weights are loaded on the CPU, then the model moves, then it starts, as the commands do."""
    tier = store != "host"

    def make(weights, dtype):
        if store == "lazy":
            return FileStore(LazyTensors([[part.clone() for part in parts] for parts in weights]), dtype)
        return make_store("file" if tier else "host", folder, weights, dtype, resident.local)

    experts = BufferedExperts(
        resident.num_experts, *resident.fc1_weight.shape[:0:-1], resident.activation,
        make_store=make, policy="lru", order=order,
    ).eval()
    experts.load_state_dict(resident.state_dict())
    experts.cuda()
    experts.start(size, host_capacity=2 if tier else None)
    return experts


@pytest.mark.parametrize("store", [store for store in STORES if store != "tier"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_outputs_are_the_resident_ones(tmp_path, store, order, size):
    resident = resident_experts(6)
    buffered = on_gpu(resident, size, store, tmp_path, order)
    resident = resident.cuda()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        counts = torch.randint(0, 3, (6,), generator=generator).tolist()
        rows = torch.randn(sum(counts), 6, generator=generator).cuda()
        buffered.prefetch(counts)
        with torch.no_grad():
            torch.testing.assert_close(buffered(rows, counts), resident(rows, counts))


def test_copies_never_overtake_the_computation():
    """Experts so large that a copy into a slot that still computes would be seen."""
    torch.manual_seed(0)
    from fairseq_moe_ext.experts.resident import ResidentExperts

    resident = ResidentExperts(8, 1024, 4096).eval()
    buffered = on_gpu(resident, 1, "host", None, "resident-first")
    resident = resident.cuda()
    rows, counts = torch.randn(8 * 512, 1024, device="cuda"), [512] * 8
    with torch.no_grad():
        wanted = resident(rows, counts)
        for _ in range(10):
            torch.testing.assert_close(buffered(rows, counts), wanted)


def test_memory_on_the_device():
    from fairseq_moe_ext.experts.resident import ResidentExperts

    resident = ResidentExperts(16, 512, 2048).eval()
    before = torch.cuda.memory_allocated()
    buffered = on_gpu(resident, 4, "host", None, "ascending")
    used = torch.cuda.memory_allocated() - before
    assert used <= resident.total_bytes * (4 + STAGING_SLOTS) / 16 * 1.01
    assert buffered.resident_bytes == resident.total_bytes * (4 + STAGING_SLOTS) // 16


def test_pinned_memory_is_let_go_with_its_tensors():
    tensors = [torch.randn(1 << 20) for _ in range(2)]
    assert pin(tensors) and all(tensor.is_pinned() for tensor in tensors)
    assert pin(tensors)  # once more changes nothing
    for _ in range(20):
        store = HostStore([[torch.randn(1 << 20)]], torch.float32)
        store.prepare(torch.device("cuda"))


def test_half_precision_on_the_device():
    source = resident_experts(5)
    buffered = buffered_twin(source, 2).half().cuda()
    resident = source.half().cuda()
    rows = torch.randn(10, 6, device="cuda").half()
    with torch.no_grad():
        torch.testing.assert_close(buffered(rows, [2] * 5), resident(rows, [2] * 5))


def test_a_place_that_cannot_be_pinned(monkeypatch):
    """Main memory for three experts, one of which is refused; copies so large that they are queued for a while."""
    torch.manual_seed(0)
    weights = [[torch.randn(1 << 22), torch.randn(1 << 10)] for _ in range(4)]
    asked = itertools.count(1)
    monkeypatch.setattr(host_tier, "pin", lambda tensors: next(asked) != 3 and pin(tensors))
    tier = HostTier(FileStore(LazyTensors(weights), torch.float32), 3)
    tier.prepare(torch.device("cuda"))
    order = [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    slots = [[torch.empty_like(part, device="cuda") for part in weights[0]] for _ in order]
    for expert, targets in zip(order, slots, strict=True):
        tier.load(expert, targets)
    for expert, targets in zip(order, slots, strict=True):
        assert all(torch.equal(target.cpu(), part) for target, part in zip(targets, weights[expert], strict=True))
