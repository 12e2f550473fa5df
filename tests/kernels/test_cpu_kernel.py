"""One or two linear layers per expert: the C kernel, with each of its instructions, and PyTorch's products, beside row
by row.

Tests of the kernel call it, whatever this CPU would choose, and are skipped where it was not compiled."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import examples, torch_threads
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import (
    FEW_ROWS,
    KERNEL_DTYPES,
    KERNELS,
    WAYS,
    asking_for,
    assert_is_linear,
    by_kernel,
    groups_of,
    make,
    make_pool,
    mlp,
    one_by_one,
    runs_here,
)

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.kernels import cpu_kernel, crossing
from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS, DTYPES, VARIABLE, Groups, Kernel, Linear
from fairseq_moe_ext.kernels.cpu_routing import CRouting

COUNTS = st.lists(st.sampled_from((0, 0, 1, 2, 3, 4, 5, 7, 9, FEW_ROWS, FEW_ROWS + 1)), min_size=1, max_size=6)


@pytest.mark.parametrize("choice", KERNELS)
@KERNEL_DTYPES
@examples(80)
@given(counts=COUNTS, inputs=st.integers(1, 40), outputs=st.integers(1, 13),
       activation=st.sampled_from((None, F.relu, F.gelu)), most=st.sampled_from((ANY_ROWS, FEW_ROWS, 2)))
def test_the_kernel_puts_each_row_through_its_expert(choice, dtype, counts, inputs, outputs, activation, most):
    rows, weight, bias = make(counts, inputs, outputs, dtype)
    assert_is_linear(choice, rows, counts, weight, bias, activation, most)


@pytest.mark.slow
@pytest.mark.skipif(not runs_here("avx2"), reason="no AVX2 here")
def test_the_code_for_avx512_computes_the_same_where_its_instructions_are_emulated(emulated_avx512):
    """Lane by lane, on a CPU that need not have them: every number of rows of a tile, every remainder."""
    library = emulated_avx512
    counts = [1, 2, 3, 4, 5, 6, 7, 9, 13, 0, 30]
    for dtype in DTYPES:
        for inputs, outputs in ((37, 11), (64, 16), (5, 3), (1043, 4)):
            rows, weight, bias = make(counts, inputs, outputs, dtype)
            for activation in (None, F.relu, F.gelu):
                assert_is_linear("avx512", rows, counts, weight / inputs**0.5, bias, activation, ANY_ROWS, library)
            assert_sums(Kernel(library, "avx512"), rows[:80])
            together = by_kernel("avx512", rows, counts, weight, bias, library=library)
            last = by_kernel("avx512", rows[-1:], [0] * 10 + [1], weight, bias, library=library)
            assert torch.equal(last, together[-1:])


def assert_sums(kernel, outputs):
    """Bit by bit the weighted sum of two rows each."""
    row_ids = torch.arange(len(outputs)).view(-1, 2)
    weights = torch.rand(row_ids.shape, generator=torch.Generator().manual_seed(1))
    first, second = (weights[:, k : k + 1] * outputs[row_ids[:, k]].float() for k in (0, 1))
    assert torch.equal(CRouting(kernel).add_choices(outputs, row_ids, weights), (first + second).to(outputs.dtype))


@pytest.mark.parametrize("choice", KERNELS)
@KERNEL_DTYPES
@pytest.mark.parametrize("count", (1, 2, 3, 4, 8, 9, 20))
def test_inputs_of_several_parts(choice, dtype, count):
    """More inputs than the kernel takes at a time for many rows, and a remainder."""
    rows, weight, bias = make([count], 2117, 6, dtype)
    result = by_kernel(choice, rows, [count], weight / 46, bias)
    expected = one_by_one(rows, [count], weight / 46, bias)
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=3e-5)
    for row in range(count):
        assert torch.equal(result[row : row + 1], by_kernel(choice, rows[row : row + 1], [1], weight / 46, bias))


@pytest.mark.parametrize("choice", KERNELS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_number_of_16_bits_is_read_and_written(choice, dtype):
    """Bit by bit PyTorch's own rounding and widening."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()].unsqueeze(1)
    zero = torch.zeros(1, 5, dtype=dtype)  # five features: four that are written together, and one alone
    for number in (1.0, 1.0078125, 300.0, 2**-12 + 2**-15):
        factor = torch.full((1, 5, 1), number, dtype=dtype)
        result = by_kernel(choice, values, [len(values)], factor, zero)
        expected = (values.float() * factor[0, 0].float()).to(dtype)
        assert torch.equal(result, expected.expand(-1, 5)), number


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("activation", (F.relu, F.gelu, torch.tanh))
@examples(20)
@given(counts=COUNTS, dim=st.integers(1, 30), hidden=st.integers(1, 30))
def test_each_row_goes_through_its_expert(choice, dtype, activation, counts, dim, hidden):
    rows, *_ = make(counts, dim, 1, dtype)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = pool = make_pool(len(counts), dim, hidden, dtype)
    with asking_for(choice):
        result = mlp(rows, counts, pool, activation)
    middle = activation(one_by_one(rows, counts, fc1_weight, fc1_bias).to(dtype).double()).to(dtype)
    expected = one_by_one(middle, counts, fc2_weight, fc2_bias).to(dtype)
    loose = {torch.float16: {"rtol": 1e-2, "atol": 3e-2}, torch.bfloat16: {"rtol": 5e-2, "atol": 2e-1}}
    torch.testing.assert_close(result, expected, **loose.get(dtype, {}))


@pytest.mark.parametrize("choice", KERNELS)
@KERNEL_DTYPES
@pytest.mark.parametrize("inputs", (64, 37))
def test_a_row_has_one_result_in_the_kernel_whoever_shares_its_expert(choice, dtype, inputs):
    counts = [FEW_ROWS, 5]
    rows, weight, bias = make(counts, inputs, 11, dtype)
    expected = by_kernel(choice, rows, counts, weight, bias)
    for number in (1, 2, 3, 4, 5, 7, 9, 13):
        few = by_kernel(choice, rows[:number], [number, 0], weight, bias)
        assert torch.equal(few, expected[:number]), number
    alone = by_kernel(choice, rows[FEW_ROWS:], [5], weight[1:], bias[1:])
    assert torch.equal(alone, expected[FEW_ROWS:])


@pytest.mark.parametrize("choice", KERNELS)
@KERNEL_DTYPES
@pytest.mark.parametrize("activation", (F.relu, F.gelu, torch.tanh))
def test_a_row_has_one_result_in_any_batch_where_the_kernel_takes_any_rows(monkeypatch, choice, dtype, activation):
    monkeypatch.setenv(VARIABLE, choice)
    monkeypatch.setenv(crossing.VARIABLE, "any")
    counts = [1, 300, 0, 70]
    rows, *_ = make(counts, 20, 1, dtype)
    pool = make_pool(4, 20, 40, dtype)
    together = mlp(rows, counts, pool, activation)
    for row, expert in ((0, 0), (1, 1), (150, 1), (300, 1), (301, 3), (370, 3)):
        alone = mlp(rows[row : row + 1], [expert == each for each in range(4)], pool, activation)
        assert torch.equal(alone, together[row : row + 1]), row


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("inputs", (64, 37))
def test_an_experts_rows_have_one_result_whatever_the_others_are(monkeypatch, choice, dtype, inputs):
    monkeypatch.setenv(VARIABLE, choice)
    counts = [3, FEW_ROWS, FEW_ROWS + 12, 1, 70]
    rows, *_ = make(counts, inputs, 1, dtype)
    pool = make_pool(len(counts), inputs, 11, dtype)
    expected = mlp(rows, counts, pool).split(counts)
    for expert, chunk in enumerate(rows.split(counts)):
        its = [part[expert : expert + 1].clone() for part in pool]
        assert torch.equal(mlp(chunk.clone(), [len(chunk)], its), expected[expert]), expert


@pytest.mark.parametrize("choice", KERNELS)
@KERNEL_DTYPES
@pytest.mark.parametrize("activation", (F.relu, F.gelu))
@pytest.mark.parametrize("counts", ([1], [4, 0, 50, 1, 9, 0, 2], [2] * 40))
def test_threads_share_every_expert(monkeypatch, choice, dtype, activation, counts):
    """Many blocks an expert, more experts than keep their hidden features at a time, and more threads than cores."""
    monkeypatch.setenv(VARIABLE, choice)
    monkeypatch.setenv(crossing.VARIABLE, "any")
    rows, *_ = make(counts, 90, 1, dtype)
    pool = make_pool(len(counts), 90, 700, dtype)
    with torch_threads(1):
        expected = mlp(rows, counts, pool, activation)
    for threads in (2, 3, 8):
        with torch_threads(threads):
            for _ in range(5):
                assert torch.equal(mlp(rows, counts, pool, activation), expected), threads


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux only")
@pytest.mark.parametrize("choice", KERNELS)
def test_one_expert_is_shared_by_threads(choice):
    """PyTorch's own: threads of the process that run meanwhile and were there before."""
    rows, weight, bias = make([3], 1024, 8192)
    with torch_threads(2):
        by_kernel(choice, rows, [3], weight, bias)
        before, end, spent = thread_seconds(), time.monotonic() + 30, {}
        while sum(seconds > 0 for seconds in spent.values()) < 2 and time.monotonic() < end:  # clocks tick coarsely
            by_kernel(choice, rows, [3], weight, bias)
            spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in thread_seconds().items()}
    assert set(spent) <= set(before), "no thread is started for a call"
    assert sum(seconds > 0 for seconds in spent.values()) >= 2, spent


def thread_seconds():
    """Of this process's threads, by their ids (Linux)."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found[task.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("activation", (F.relu, F.gelu))
def test_not_a_number_is_not_lost(monkeypatch, choice, activation):
    monkeypatch.setenv(VARIABLE, choice)
    counts = [1, 2, FEW_ROWS + 1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows, weight, bias = make(counts, 8, 4, dtype)
        rows[1, 3], rows[2, 0], rows[-1, 0] = float("nan"), float("inf"), float("nan")
        results = [mlp(rows, counts, make_pool(3, 8, 4, dtype), activation)]
        if choice != "off":
            results.append(by_kernel(choice, rows, counts, weight, bias, activation))
        for result in results:
            assert result[1].isnan().all() and not result[2].isfinite().all() and result[-1].isnan().all()
            assert result[0].isfinite().all() and result[3:-1].isfinite().all()


@pytest.mark.parametrize("change", ["outputs", "inputs", "bias", "dtype", "float64", "strides"])
def test_misfits_are_refused(change):
    counts = [2, 1, 3]
    rows, weight, bias = make(counts, 8, 4)
    outputs = rows.new_empty(6, 3 if change == "outputs" else 4)
    if change == "inputs":
        rows = rows[:, :7].clone()
    elif change == "bias":
        bias = bias[:, :3].clone()
    elif change == "dtype":
        bias = bias.bfloat16()
    elif change == "float64":
        rows = rows.double()
    elif change == "strides":
        rows = rows.t().contiguous().t()
    message = {"outputs": "must have the last weight's 4 features, got 3", "float64": "rows must be of one of",
               "dtype": "bias must be contiguous, on the CPU", "strides": "rows must be contiguous"}
    kernel = Kernel(cpu_kernel._library(), "plain") if runs_here("plain") else pytest.skip("no kernel here")
    with pytest.raises(ValueError, match=message.get(change, r"must fit the weight \(3, 4, 8\)")):
        kernel.run(rows, [Linear(weight, bias)], groups_of(counts), outputs)


@pytest.mark.skipif(not runs_here("plain"), reason="no kernel here")
@pytest.mark.parametrize("sources, targets, slots", [([0, 5], [0, 2], [0, 1]), ([0, 2], [0, 4], [0, 1]),
                                                     ([0, 2], [0, 2], [0, 2]), ([-1, 2], [0, 2], [0, 1])])
def test_nothing_is_read_or_written_where_there_is_nothing(sources, targets, slots):
    rows, weight, bias = make([3, 3], 8, 4)
    outputs = rows.new_zeros(6, 4)
    with pytest.raises(ValueError, match="groups must lie within the 6 rows, 6 outputs and 2 slots"):
        kernel = Kernel(cpu_kernel._library(), "plain")
        kernel.run(rows, [Linear(weight, bias)], Groups(sources, targets, [2, 3], slots), outputs)
    assert not outputs.any()


@pytest.mark.skipif(not runs_here("plain"), reason="no kernel here")
@pytest.mark.parametrize("inputs, outputs", [(0, 3), (3, 0)])
def test_layers_without_features_are_refused(inputs, outputs):
    rows, weight, bias = make([2], inputs, outputs)
    with pytest.raises(ValueError, match="a weight must have inputs and outputs"):
        by_kernel("plain", rows, [2], weight, bias)


@pytest.mark.skipif(not runs_here("plain"), reason="no kernel here")
@pytest.mark.parametrize("number", [0, 3])
def test_other_numbers_of_layers_are_refused(number):
    rows, weight, bias = make([2], 4, 4)
    with pytest.raises(ValueError, match=f"layers must be one or two, got {number}"):
        kernel = Kernel(cpu_kernel._library(), "plain")
        kernel.run(rows, [Linear(weight, bias)] * number, groups_of([2]), torch.empty(2, 4))


@pytest.mark.parametrize("choice", KERNELS)
@KERNEL_DTYPES
def test_an_expert_with_many_rows_is_computed_in_parts(choice, dtype):
    """What is kept meanwhile does not grow with its rows, and its rows' bits are those of few."""
    counts = [3, 2 * cpu_kernel.LONGEST + 5, cpu_kernel.LONGEST, 0, cpu_kernel.LONGEST + 1]
    rows, weight, bias = make(counts, 20, 6, dtype)
    split = groups_of(counts).split(ANY_ROWS)
    assert split.counts.max() == cpu_kernel.LONGEST and split.counts.sum() == sum(counts)
    together = by_kernel(choice, rows, counts, weight, bias).split(counts)
    for expert, chunk in enumerate(rows.split(counts)):
        its = slice(expert, expert + 1)
        for first in range(0, counts[expert], 100):
            few = chunk[first : first + 100]
            found = by_kernel(choice, few, [len(few)], weight[its], bias[its])
            assert torch.equal(found, together[expert][first : first + 100])
    most = cpu_kernel.LONGEST + 1
    left = by_kernel(choice, rows, counts, weight, bias, most=most).split(counts)
    assert left[1].isnan().all() and all(torch.equal(left[number], together[number]) for number in (0, 2, 3, 4))


@pytest.mark.skipif(not runs_here("plain"), reason="no kernel here")
def test_a_gradient_is_refused():
    rows, weight, bias = make([3, 3], 8, 4)
    with pytest.raises(ValueError, match="weight must need no gradient"):
        by_kernel("plain", rows, [3, 3], weight.requires_grad_(), bias)
    with torch.no_grad():
        by_kernel("plain", rows, [3, 3], weight, bias)


@pytest.mark.parametrize("counts", ([2, 1, 4], [2, 4]))
def test_counts_that_do_not_sum_to_the_rows_are_refused(counts):
    experts = ResidentExperts(len(counts), 8, 4).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="must sum to the 5 rows, got"):
        experts(torch.ones(5, 8), counts)


@pytest.mark.parametrize("choice", KERNELS)
@KERNEL_DTYPES
def test_rows_come_from_and_go_anywhere_and_weights_lie_in_any_slot(choice, dtype):
    """Bit by bit what rows and weights in order give, and nothing else is touched."""
    counts, sources, targets, slots = [2, 51, 5], [60, 2, 0], [0, 5, 70], [3, 0, 1]
    rows, weight, bias = make([70, 0, 0, 0], 37, 11, dtype)
    outputs = rows.new_full((80, 11), float("nan"))
    kernel = Kernel(cpu_kernel._library(), choice)
    kernel.run(rows, [Linear(weight, bias)], Groups(sources, targets, counts, slots), outputs)
    for count, source, target, slot in zip(counts, sources, targets, slots, strict=True):
        its, chunk = slice(slot, slot + 1), rows[source : source + count].clone()
        alone = by_kernel(choice, chunk, [count], weight[its].clone(), bias[its].clone())
        assert torch.equal(outputs[target : target + count], alone)
        outputs[target : target + count] = float("nan")
    assert outputs.isnan().all()


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_experts_lie_in_any_slot_and_those_without_one_are_left_alone(choice, dtype):
    counts, slots = [2, FEW_ROWS + 3, 4, 5], [3, 0, -1, 1]
    rows, *_ = make(counts, 37, 1, dtype)
    pool = make_pool(5, 37, 11, dtype)
    with asking_for(choice):
        outputs = mlp(rows, counts, pool, slots=torch.tensor(slots, dtype=torch.int32))
        for chunk, found, slot in zip(rows.split(counts), outputs.split(counts), slots, strict=True):
            if slot < 0:
                assert found.isnan().all()
            else:
                its = [part[slot : slot + 1].clone() for part in pool]
                assert torch.equal(found, mlp(chunk.clone(), [len(chunk)], its))


@pytest.mark.parametrize("activation", (F.relu, F.gelu))
def test_experts_without_gradients_are_those_with(activation):
    torch.manual_seed(0)
    counts = [0, 300, 7, 600, 0, 1, 0]  # more than what is computed at once
    experts = ResidentExperts(len(counts), 12, 20, activation=activation).eval()
    rows = torch.randn(sum(counts), 12)
    with_gradients = experts(rows, counts)
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(experts(rows, counts), with_gradients.detach())
        assert experts(rows[:0], [0] * len(counts)).shape == (0, 12)
