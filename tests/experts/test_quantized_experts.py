"""Experts that are quantised while they are loaded, resident and in a buffer over every store that can hold them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES
from fairseq_moe_ext.buffering.expert_file import open_or_build
from fairseq_moe_ext.buffering.host_tier import HostTier
from fairseq_moe_ext.buffering.store import FileStore, HostStore
from fairseq_moe_ext.experts.formats import FORMATS, Float, Quantized, format_named
from fairseq_moe_ext.experts.quantized import QuantizedExperts
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.kernels.choice import KERNELS

NAMES = pytest.mark.parametrize("name", ["int8", "int4"])
COUNTS = [3, 0, 5, 1]
DIM, HIDDEN = 70, 33


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def floats(local=None, seed=0) -> ResidentExperts:
    torch.manual_seed(seed)
    return ResidentExperts(4, DIM, HIDDEN, F.relu, local=local).eval()


def quantized(name, experts=None) -> QuantizedExperts:
    experts = floats() if experts is None else experts
    found = QuantizedExperts.in_place_of(experts, name).eval()
    found.load_state_dict(experts.state_dict())
    return found


def rows_of(counts=COUNTS, dtype=torch.float32, seed=1):
    return torch.randn(sum(counts), DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


@NAMES
def test_they_compute_nearly_what_their_originals_do(name):
    rows = rows_of()
    expected, found = floats()(rows, COUNTS), quantized(name)(rows, COUNTS)
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < (0.02 if name == "int8" else 0.15)


@NAMES
def test_the_loop_is_the_mode_that_widens_the_weights_and_leaves_rows_as_they_are(name):
    experts, rows = quantized(name), rows_of()
    experts.use_kernel("loop")
    fc1, bias1, fc2, bias2 = experts.format.block.widen(experts.blocks)
    expected = torch.cat([F.linear(F.relu(F.linear(part, fc1[e], bias1[e])), fc2[e], bias2[e])
                          for e, part in enumerate(rows.split(COUNTS))])
    torch.testing.assert_close(experts(rows, COUNTS), expected)


@NAMES
@pytest.mark.parametrize("wanted", KERNELS)
def test_a_kernel_that_reads_no_quantised_experts_is_refused(name, wanted):
    experts = quantized(name)
    experts.use_kernel(wanted)
    if wanted in ("auto", "loop"):
        return experts(rows_of(), COUNTS)
    with pytest.raises(ValueError, match=f"kernel must be one of auto, loop for experts in {name}, got {wanted}"):
        experts(rows_of(), COUNTS)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_models_dtype_is_of_rows_and_results_and_changes_no_weight(name, dtype):
    experts, rows = quantized(name), rows_of(dtype=dtype)
    before, expected = experts.blocks.clone(), experts(rows.float(), COUNTS).to(dtype)
    for way in (dtype, torch.float32, dtype):
        experts.to(way)
    assert experts.dtype == dtype and experts.input_dtype(rows) == dtype
    assert torch.equal(experts.blocks, before) and experts.blocks.dtype == torch.uint8
    assert torch.equal(experts(rows, COUNTS), expected)
    early = QuantizedExperts.in_place_of(floats(), name).to(dtype).eval()
    early.load_state_dict(floats().state_dict())
    assert torch.equal(early.blocks, before)  # of the originals, whenever the model takes its dtype
    assert torch.equal(copy.deepcopy(early)(rows, COUNTS), expected)


@NAMES
def test_local_experts_are_those_of_all(name):
    whole, part = quantized(name), quantized(name, floats(local=(1, 3)))
    part.load_state_dict(floats().state_dict())
    assert torch.equal(part.blocks, whole.blocks[[1, 3]])
    assert part.total_bytes == part.resident_bytes == 2 * part.expert_bytes == part.blocks.nbytes


@NAMES
def test_a_rank_may_hold_no_expert(name):
    experts = quantized(name, floats(local=()))
    assert experts(torch.zeros(0, DIM), []).shape == (0, DIM) and experts.total_bytes == 0


@NAMES
def test_what_does_not_fit_is_an_error_strict_or_not(name):
    state = dict(floats().state_dict())
    experts = QuantizedExperts.in_place_of(floats(), name)
    lacking = {key: value for key, value in state.items() if key != "2.fc1.bias"}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="2.fc1.bias: missing, and these experts have no values of their own"):
            experts.load_state_dict(lacking, strict)
        with pytest.raises(RuntimeError, match=r"1.fc2.weight: expected shape \(70, 33\), got \(70, 34\)"):
            experts.load_state_dict({**state, "1.fc2.weight": torch.zeros(70, 34)}, strict)
    with pytest.raises(RuntimeError, match="9.fc1.bias"):
        experts.load_state_dict({**state, "9.fc1.bias": torch.zeros(33)})
    experts.load_state_dict({**state, "9.fc1.bias": torch.zeros(33)}, strict=False)


@NAMES
def test_a_weight_that_is_not_finite_is_named(name):
    state = floats().state_dict()
    state["3.fc2.weight"][1, 2] = float("nan")
    with pytest.raises(ValueError, match="^3.fc2.weight: weights must be finite numbers"):
        QuantizedExperts.in_place_of(floats(), name).load_state_dict(state)
    with pytest.raises(ValueError, match="^3.fc2.weight: weights must be finite numbers"):
        in_buffer(name, "host", None, state=state)


@NAMES
def test_they_are_not_trained_and_not_saved_as_floats(name):
    experts = quantized(name)
    with torch.enable_grad():
        outputs = experts(rows_of().requires_grad_(), COUNTS)
        with pytest.raises(RuntimeError, match="quantised experts have no gradients"):
            outputs.sum().backward()
    with pytest.raises(RuntimeError, match="quantised experts cannot be trained"):
        experts.train()(rows_of(), COUNTS)
    for each in (experts, in_buffer(name, "host", None)):
        with pytest.raises(RuntimeError, match=f"experts in {name} are not saved as floats"):
            each.state_dict()


def in_buffer(name, kind, folder, size=2, policy="lfu", order="resident-first", state=None, dtype=torch.float32):
    form = format_named(name, DIM, HIDDEN)

    def make(weights, as_dtype):
        assert as_dtype == torch.uint8 and all(len(parts) == 1 for parts in weights)
        if kind == "host":
            return HostStore(weights, as_dtype)
        file = open_or_build(folder / "x.safetensors", range(4), weights, "fingerprint", form.keys, form.version)
        store = FileStore(file, as_dtype)
        return store if kind == "file" else HostTier(store, capacity=1)

    experts = BufferedExperts(4, DIM, HIDDEN, F.relu, make_store=make, policy=policy, order=order, form=form)
    experts.to(dtype).eval().load_state_dict(floats().state_dict() if state is None else state)
    experts.start(size)
    return experts


@NAMES
@pytest.mark.parametrize("kind", ["host", "file", "tier"])
@pytest.mark.parametrize("policy, order", zip(POLICIES, ORDERS * 2, strict=True))
def test_a_buffer_changes_no_bit(name, kind, policy, order, tmp_path):
    resident, buffered = quantized(name), in_buffer(name, kind, tmp_path, 1, policy, order)
    assert buffered.expert_bytes == resident.expert_bytes == Quantized(DIM, HIDDEN, resident.format.bits).block.nbytes
    for number, counts in enumerate(([3, 0, 5, 1], [0, 1, 1, 0], [2, 2, 2, 2])):
        rows = rows_of(counts, seed=number)
        assert torch.equal(buffered(rows, counts), resident(rows, counts))
    assert buffered.totals.bytes_copied == buffered.totals.misses * resident.expert_bytes > 0
    buffered.half()
    resident.half()
    rows = rows_of(dtype=torch.float16)
    assert torch.equal(buffered(rows, COUNTS), resident(rows, COUNTS))


@NAMES
def test_a_stores_file_has_a_block_and_a_checksum_per_expert_and_is_of_its_format_alone(name, tmp_path):
    in_buffer(name, "file", tmp_path)
    file = tmp_path / "x.safetensors"
    first = file.stat().st_ino
    header = file.read_bytes()[8:4096].decode("latin-1")
    assert all(f'"{expert}.{name}"' in header for expert in range(4)) and '"group 64, version 2"' in header
    in_buffer(name, "file", tmp_path)
    assert file.stat().st_ino == first
    in_buffer({"int8": "int4", "int4": "int8"}[name], "file", tmp_path)
    assert file.stat().st_ino != first


def test_a_format_knows_its_bytes():
    assert [format_named(name, 2048, 8192).expert_bytes(torch.float16) for name in FORMATS] == [
        67_129_344, 33 * 2**20 + 81_920, 17 * 2**20 + 81_920
    ]
    assert Float(2048, 8192).expert_bytes(torch.float32) == 2 * Float(2048, 8192).expert_bytes(torch.bfloat16)
