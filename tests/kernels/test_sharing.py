"""How threads share experts (cpu/sharing.h) and touch their weights (cpu/touching.h, numa.py): by the C kernel,
compiled so that it records who takes which block and who touches which page. Machines with several memory nodes are
simulated.

Legend: M = output features, K = input features.
"""

import ctypes
from collections import Counter, defaultdict
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import torch_threads
from kernel_calls import SOURCE, compiled, groups_of, make, make_pool, needs_compiler

from fairseq_moe_ext.experts.formats import format_named
from fairseq_moe_ext.experts.quantized import QuantizedExperts
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.kernels import cpu_kernel, numa, quantized_kernel
from fairseq_moe_ext.kernels.block import Block, QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import Kernel, Linear
from fairseq_moe_ext.kernels.quantized_kernel import QuantizedKernel

pytestmark = needs_compiler
DIM, HIDDEN = 512, 1000
# rows of fc1 (M = HIDDEN, K = DIM) and fc2 that a thread takes at a time, 64 KiB or so: in multiples of 16 of float32,
# of 64 of 16 and 8 bits (of which a row has 528 bytes in fc1 and 1056 in fc2)
BLOCK_ROWS = {torch.float32: (32, 16), torch.float16: (64, 64), torch.uint8: (128, 64)}
PAGE = 4096


class Record(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("thread", "system_thread", "stage", "number", "place")]


class Recorder:
    """What the library has recorded since `clear`."""

    def __init__(self, library):
        self.library = library
        self.clear()

    def clear(self, sleeps=()):
        """sleeps: microseconds of each thread before a block."""
        for name in ("num_taken", "num_touched"):
            self.number(name).value = 0
        all_sleeps = (ctypes.c_int64 * 64).in_dll(self.library, "sleeps")
        all_sleeps[:] = [*sleeps, *[0] * (64 - len(sleeps))]

    def number(self, name):
        return ctypes.c_int64.in_dll(self.library, name)

    def records(self, name):
        count = self.number(f"num_{name}").value
        return (Record * 65536).in_dll(self.library, name)[:count]

    def use_smaller_team(self, monkeypatch, size, numbered):
        """numbered: the last ones of those that were asked for; else as they arrive."""
        self.number("team_size").value = size
        functions = self.library.smaller_team, self.library.own_number_of_team
        start, number = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        monkeypatch.setattr(cpu_kernel, "_team", lambda: (start, number if numbered else 0))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    header = Path(__file__).parent / "recorded_sharing.h"
    return compiled(tmp_path_factory.mktemp("recorded"), SOURCE, "-O1", "-include", header, "-pthread", "-lm")


@pytest.fixture
def recorder(library):
    return Recorder(library)


class FloatCall:
    """Experts of two layers: two stages."""

    def __init__(self, library, counts):
        self.kernel, self.counts = Kernel(library, "plain"), counts
        self.rows, *_ = make(counts, DIM, 1)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = make_pool(len(counts), DIM, HIDDEN)
        self.layers = [Linear(fc1_weight, fc1_bias, F.relu), Linear(fc2_weight, fc2_bias)]
        self.blocks = (-(-HIDDEN // 32), DIM // 16)

    def run(self):
        outputs = torch.full_like(self.rows, torch.nan)
        self.kernel.run(self.rows, self.layers, groups_of(self.counts), outputs)
        return outputs


class QuantizedCall:
    """Rows are quantised in a stage of their own."""

    def __init__(self, library, counts):
        self.kernel, self.counts = QuantizedKernel(Kernel(library, "plain")), counts
        self.rows, *_ = make(counts, DIM, 1)
        block = Block(8, DIM, HIDDEN)
        blocks = torch.zeros(len(counts), block.nbytes, dtype=torch.uint8)
        self.pool = QuantizedPool(block, blocks)
        generator = torch.Generator().manual_seed(0)
        for layer in block.layers(blocks):
            layer.codes.copy_(torch.randint(-127, 128, layer.codes.shape, generator=generator))
            layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator))
            layer.units.fill_(1)
        self.blocks = (1, -(-HIDDEN // 128), DIM // 64)  # 16 groups of inputs at a time

    def run(self):
        outputs = torch.full_like(self.rows, torch.nan)
        self.kernel.run(self.rows, self.pool, groups_of(self.counts), outputs, F.relu)
        return outputs


CALLS = pytest.mark.parametrize("call_class", (FloatCall, QuantizedCall))
COUNTS = [3, 0, 1, 2, 5, 1, 1, 4]  # more experts with rows than keep hidden features at a time


def assert_every_block_is_taken_once(records, blocks, counts):
    experts = sum(count > 0 for count in counts)
    expected = {key for stage, count in enumerate(blocks) for key in product([stage], range(experts), range(count))}
    assert Counter((each.stage, each.number, each.place) for each in records) == Counter(expected)


def owner_of(block, blocks, threads):
    (owner,) = (each for each in range(threads) if each * blocks // threads <= block < (each + 1) * blocks // threads)
    return owner


@CALLS
@pytest.mark.parametrize("threads", (2, 3, 8))
def test_every_block_is_computed_once_with_the_bits_of_one_thread(recorder, call_class, threads):
    call = call_class(recorder.library, COUNTS)
    with torch_threads(1):
        expected = call.run()
    assert not expected.isnan().any()
    for sleeps in ((), (300,) * threads, (0, 2000)):
        recorder.clear(sleeps)
        with torch_threads(threads):
            assert torch.equal(call.run(), expected)
        assert_every_block_is_taken_once(recorder.records("taken"), call.blocks, COUNTS)


@CALLS
def test_a_thread_takes_its_own_blocks_first_and_equally_fast_threads_few_others(recorder, call_class):
    threads, call = 4, call_class(recorder.library, COUNTS)
    recorder.clear([3000] * threads)  # beside which computing takes no time, on any number of cores
    with torch_threads(threads):
        call.run()
    records = recorder.records("taken")
    of_threads = defaultdict(list)
    for each in records:
        is_own = owner_of(each.place, call.blocks[each.stage], threads) == each.thread
        of_threads[each.thread, each.stage, each.number].append(is_own)
    assert {thread for thread, *_ in of_threads} == set(range(threads))
    for taken in of_threads.values():
        assert all(before or not after for before, after in pairwise(taken)), "its own ones come first"
    shared = [each for each in records if call.blocks[each.stage] >= threads]
    own = sum(owner_of(each.place, call.blocks[each.stage], threads) == each.thread for each in shared)
    assert own > 0.5 * len(shared), "a quarter, by turns"


@CALLS
def test_a_slow_threads_blocks_are_taken_over(recorder, call_class):
    threads, slow, call = 3, 1, call_class(recorder.library, COUNTS)
    with torch_threads(1):
        expected = call.run()
    recorder.clear([0, 20_000, 0])
    with torch_threads(threads):
        assert torch.equal(call.run(), expected)
    records = recorder.records("taken")
    assert_every_block_is_taken_once(records, call.blocks, COUNTS)
    owned = sum(owner_of(each.place, call.blocks[each.stage], threads) == slow for each in records)
    assert sum(each.thread == slow for each in records) < owned / 2


@CALLS
@pytest.mark.parametrize("size", (1, 2, 3))
@pytest.mark.parametrize("numbered", (True, False), ids=("numbered", "as they arrive"))
def test_a_team_that_is_smaller_than_asked_for_computes_everything(monkeypatch, recorder, call_class, size, numbered):
    call = call_class(recorder.library, COUNTS)
    with torch_threads(1):
        expected = call.run()
    recorder.use_smaller_team(monkeypatch, size, numbered)
    recorder.clear()
    with torch_threads(8):
        assert torch.equal(call.run(), expected)
    records = recorder.records("taken")
    assert_every_block_is_taken_once(records, call.blocks, COUNTS)
    members = range(8 - size, 8) if numbered else range(size)
    assert {each.thread for each in records} <= set(members)


def system_threads(records):
    """Of each thread that took or touched something."""
    found = defaultdict(set)
    for each in records:
        found[each.thread].add(each.system_thread)
    return found


def test_a_thread_has_one_number_in_all_calls(recorder):
    call = FloatCall(recorder.library, COUNTS)
    recorder.clear([1000] * 3)
    with torch_threads(3):
        for _ in range(8):
            call.run()
            torch.ones(400, 400) @ torch.ones(400, 400)
    found = system_threads(recorder.records("taken"))
    assert set(found) == {0, 1, 2} and all(len(each) == 1 for each in found.values())


# ---- new memory


@pytest.fixture
def two_nodes(monkeypatch, recorder):
    """The kernel that records serves, on a machine that seems to have two nodes."""
    kernel = Kernel(recorder.library, "plain")
    monkeypatch.setattr(numa, "count_nodes", lambda: 2)
    monkeypatch.setattr(numa, "load_kernel", lambda: kernel)
    monkeypatch.setattr(quantized_kernel, "load_kernel", lambda: kernel)


def pages_of_owners(start, slots, slot_bytes, rows, row_bytes, block, threads):
    """(page, owner) of all pages that begin within the rows."""
    blocks = -(-rows // block)
    for slot, row_block in product(range(slots), range(blocks)):
        first = start + slot * slot_bytes + row_block * block * row_bytes
        end = start + slot * slot_bytes + min((row_block + 1) * block, rows) * row_bytes
        for page in range(-(-first // PAGE) * PAGE, end, PAGE):
            yield page, owner_of(row_block, blocks, threads)


def pages_of_floats(weights, threads):
    for weight, block in zip(weights, BLOCK_ROWS[weights[0].dtype], strict=True):
        slots, outputs, inputs = weight.shape
        row_bytes = inputs * weight.element_size()
        yield from pages_of_owners(weight.data_ptr(), slots, outputs * row_bytes, outputs, row_bytes, block, threads)


def pages_of_blocks(block, blocks, threads):
    for planes, rows in zip(block.planes, BLOCK_ROWS[torch.uint8], strict=True):
        for start, size in ((planes.codes, 64), (planes.scales, 2)):
            yield from pages_of_owners(blocks.data_ptr() + start, len(blocks), block.nbytes, planes.outputs,
                                       planes.groups * size, rows, threads)


def touched(recorder):
    return sorted((each.place, each.thread) for each in recorder.records("touched"))


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("on_meta", (False, True))
def test_new_experts_pages_are_touched_by_the_threads_that_own_them(recorder, threads, dtype, on_meta):
    with torch_threads(threads):
        with torch.device("meta" if on_meta else "cpu"):
            experts = ResidentExperts(3, DIM, HIDDEN, initialize=False)
        if on_meta:
            experts.to_empty(device="cpu")
        if dtype != torch.float32:
            for parameter in experts.parameters():
                parameter.data.normal_()
            before = {name: value.to(dtype) for name, value in experts.state_dict().items()}
            recorder.clear()
            experts.to(dtype)
            assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())
    assert touched(recorder) == sorted(pages_of_floats([experts.fc1_weight, experts.fc2_weight], threads))


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("on_meta", (False, True))
def test_new_quantised_experts_pages_are_touched_by_the_threads_that_own_them(recorder, threads, on_meta):
    form = format_named("int8", DIM, HIDDEN)
    with torch_threads(threads):
        with torch.device("meta" if on_meta else "cpu"):
            experts = QuantizedExperts(3, form, F.relu)
        if on_meta:
            experts.to_empty(device="cpu")
    assert touched(recorder) == sorted(pages_of_blocks(form.block, experts.blocks, threads))


@pytest.mark.usefixtures("two_nodes")
def test_the_thread_that_touches_a_page_is_the_one_that_computes_its_rows(recorder):
    with torch_threads(3):
        experts = ResidentExperts(len(COUNTS), DIM, HIDDEN, initialize=False)
        touching = system_threads(recorder.records("touched"))
        recorder.clear([1000] * 3)
        FloatCall(recorder.library, COUNTS).run()
    assert len(touching) == 3 and touching == system_threads(recorder.records("taken"))
    assert experts.fc1_weight.numel()


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("size", (1, 2))
def test_a_smaller_team_touches_every_page(monkeypatch, recorder, size):
    recorder.use_smaller_team(monkeypatch, size, numbered=True)
    with torch_threads(5):
        experts = ResidentExperts(3, DIM, HIDDEN, initialize=False)
    assert touched(recorder) == sorted(pages_of_floats([experts.fc1_weight, experts.fc2_weight], 5))


@pytest.mark.usefixtures("two_nodes")
def test_nothing_is_touched_on_one_node_nor_where_there_are_values(monkeypatch, recorder):
    experts = ResidentExperts(3, DIM, HIDDEN, initialize=False)
    recorder.clear()
    experts.load_state_dict(ResidentExperts(3, DIM, HIDDEN).state_dict())
    recorder.clear()
    experts.float().requires_grad_(False).eval()
    assert not touched(recorder)
    monkeypatch.setattr(numa, "count_nodes", lambda: 1)
    ResidentExperts(3, DIM, HIDDEN, initialize=False).half()
    QuantizedExperts(3, format_named("int4", DIM, HIDDEN), F.relu)
    assert not touched(recorder)


@pytest.mark.parametrize("text, nodes", [("0\n", 1), ("0-1\n", 2), ("0,2-3\n", 3), ("\n", 1), (None, 1)])
def test_nodes_are_counted_as_linux_lists_them(monkeypatch, tmp_path, text, nodes):
    monkeypatch.setattr(numa, "ONLINE", tmp_path / "online")
    if text is not None:
        numa.ONLINE.write_text(text)
    assert numa.count_nodes.__wrapped__() == nodes
