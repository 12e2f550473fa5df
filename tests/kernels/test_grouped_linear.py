"""One linear layer per expert: the C kernel, with each of its instructions, and PyTorch's product beside row by row.

Tests of the kernel call it, whatever this CPU would choose, and are skipped where it was not compiled."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import examples, torch_threads
from hypothesis import example, given
from hypothesis import strategies as st

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.kernels import grouped_linear
from fairseq_moe_ext.kernels.grouped_linear import ANY_ROWS, CHOICES, FEW_ROWS, VARIABLE, Groups, most_rows
from fairseq_moe_ext.kernels.offsets import Offsets

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]


def runs_here(choice: str) -> bool:
    """Whether the kernel was compiled and the CPU has these instructions."""
    library = grouped_linear._library()
    return library is not None and (choice == "plain" or bool(library.has_avx2()))


KERNELS = [pytest.param(choice, marks=pytest.mark.skipif(not runs_here(choice), reason=f"no kernel {choice} here"))
           for choice in ("plain", "avx2")]
WAYS = [*KERNELS, "off"]


def make(counts, inputs, outputs, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return normal(sum(counts), inputs), normal(len(counts), outputs, inputs), normal(len(counts), outputs)


def one_by_one(rows, counts, weight, bias, relu):
    """In double precision."""
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    results = [weight[owner].double() @ row.double() + bias[owner].double()
               for row, owner in zip(rows, owners, strict=True)]
    result = torch.stack(results) if results else rows.new_zeros(0, weight.size(1)).double()
    return result.relu() if relu else result


def groups_of(counts):
    starts = Offsets.of_counts(counts).on_host[:-1].numpy()
    return Groups(starts, starts, np.array(counts, np.int32), np.arange(len(counts), dtype=np.int32), sum(counts))


def linear(rows, counts, weight, bias, relu=False):
    """`grouped_linear` of rows in expert order into a new tensor."""
    output = rows.new_empty(rows.size(0), weight.size(1))
    grouped_linear.grouped_linear(rows, weight, bias, groups_of(counts), output, relu)
    return output


@contextmanager
def asking_for(choice: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, choice)
        yield


def by_kernel(choice, rows, counts, weight, bias, relu=False, most=ANY_ROWS):
    """The C kernel's own result; rows that it leaves as they are stay NaN."""
    output = rows.new_full((rows.size(0), weight.size(1)), float("nan"))
    with asking_for(choice):
        grouped_linear.run_kernel(rows, weight, bias, groups_of(counts), output, relu, most)
    return output


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler here")
def test_the_kernel_compiles_without_a_warning(tmp_path):
    parts = ["build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    flags = {**os.environ, "CFLAGS": "-Wall -Wextra -Werror -Wno-unused-parameter"}
    subprocess.run([sys.executable, "setup.py", "-q", *parts], cwd=REPOSITORY, env=flags, check=True)
    (file,) = tmp_path.glob("fairseq_moe_ext/kernels/_grouped_linear*")
    assert {0, 1} >= {ctypes.CDLL(file).has_avx2()}


def test_few_rows_go_to_the_kernel_where_there_is_one(monkeypatch):
    compiled = runs_here("plain")
    for choice, there in (("auto", compiled), ("plain", compiled), ("off", False)):
        if there or choice != "plain":
            monkeypatch.setenv(VARIABLE, choice)
            assert most_rows(torch.float32, CPU) == (FEW_ROWS if there else 0)
            assert most_rows(torch.float16, CPU) == most_rows(torch.float64, CPU) == 0
    monkeypatch.setattr(grouped_linear, "has_bfloat16_units", lambda: True)
    assert most_rows(torch.bfloat16, CPU) == 0
    monkeypatch.setattr(grouped_linear, "has_bfloat16_units", lambda: False)
    monkeypatch.setenv(VARIABLE, "auto")
    assert most_rows(torch.bfloat16, CPU) == (ANY_ROWS if compiled else 0)


@pytest.mark.parametrize("choice", ("avx512", "AVX2", "0", "on"))
def test_a_choice_that_there_is_not_is_refused(monkeypatch, choice):
    monkeypatch.setenv(VARIABLE, choice)
    with pytest.raises(ValueError, match=f"^{VARIABLE} must be one of {', '.join(CHOICES)}, got '{choice}'$"):
        grouped_linear.load_kernel()


def test_a_choice_that_this_machine_lacks_is_refused(monkeypatch):
    grouped_linear._kernel.cache_clear()
    for choice in ("plain", "avx2"):
        monkeypatch.setenv(VARIABLE, choice)
        monkeypatch.setattr(grouped_linear, "_library", lambda: None)
        with pytest.raises(ValueError, match=f"^{VARIABLE} {choice} needs the C kernel, which"):
            grouped_linear.load_kernel()
    monkeypatch.setattr(grouped_linear, "_library", lambda: type("", (), {"has_avx2": lambda self: 0})())
    with pytest.raises(ValueError, match=f"^{VARIABLE} avx2 needs a CPU with AVX2 and FMA$"):
        grouped_linear.load_kernel()
    grouped_linear._kernel.cache_clear()


def test_a_kernel_of_another_version_is_none(monkeypatch):
    """A checkout may have moved on since it was installed."""
    other = type("", (), {"origin": grouped_linear.find_spec("_ctypes").origin})
    monkeypatch.setattr(grouped_linear, "find_spec", lambda name: other)
    assert grouped_linear._library() is None


COUNTS = st.lists(st.sampled_from((0, 0, 1, 2, 3, 4, 5, 7, 9, FEW_ROWS, FEW_ROWS + 1)), min_size=1, max_size=6)


@pytest.mark.parametrize("choice", KERNELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@examples(80)
@given(counts=COUNTS, inputs=st.integers(1, 40), outputs=st.integers(1, 13), relu=st.booleans(),
       most=st.sampled_from((ANY_ROWS, FEW_ROWS, 2)))
def test_the_kernel_puts_each_row_through_its_expert(choice, dtype, counts, inputs, outputs, relu, most):
    rows, weight, bias = make(counts, inputs, outputs, dtype)
    expected = one_by_one(rows, counts, weight, bias, relu)
    for chunk, count in zip(expected.split(counts), counts, strict=True):
        if count > most:
            chunk.fill_(float("nan"))
    result = by_kernel(choice, rows, counts, weight, bias, relu, most)
    rounding = torch.finfo(dtype).eps / 2  # once, to the nearest: what float32 sums lose beside it is absolute
    torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@examples(40)
@given(counts=COUNTS, inputs=st.integers(1, 40), outputs=st.integers(1, 13), relu=st.booleans())
def test_each_row_goes_through_its_expert(choice, dtype, counts, inputs, outputs, relu):
    rows, weight, bias = make(counts, inputs, outputs, dtype)
    with asking_for(choice):
        result = linear(rows, counts, weight, bias, relu)
    torch.testing.assert_close(result, one_by_one(rows, counts, weight, bias, relu).to(dtype))


@pytest.mark.parametrize("choice", KERNELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("inputs", (64, 37))
def test_a_row_has_one_result_in_the_kernel_whoever_shares_its_expert(choice, dtype, inputs):
    counts = [FEW_ROWS, 5]
    rows, weight, bias = make(counts, inputs, 11, dtype)
    expected = by_kernel(choice, rows, counts, weight, bias)
    for number in (1, 2, 3, 4, 5, 7):
        few = by_kernel(choice, rows[:number], [number, 0], weight, bias)
        assert torch.equal(few, expected[:number]), number
    alone = by_kernel(choice, rows[FEW_ROWS:], [5], weight[1:], bias[1:])
    assert torch.equal(alone, expected[FEW_ROWS:])


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("inputs", (64, 37))
def test_an_experts_rows_have_one_result_whatever_the_others_are(monkeypatch, choice, dtype, inputs):
    monkeypatch.setenv(VARIABLE, choice)
    counts = [3, FEW_ROWS, FEW_ROWS + 12, 1, 70]
    rows, weight, bias = make(counts, inputs, 11, dtype)
    expected = linear(rows, counts, weight, bias).split(counts)
    for expert, chunk in enumerate(rows.split(counts)):
        its = slice(expert, expert + 1)
        found = linear(chunk.clone(), [len(chunk)], weight[its].clone(), bias[its].clone())
        assert torch.equal(found, expected[expert]), expert


@pytest.mark.parametrize("choice", KERNELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("threads", (2, 3, 8))
def test_threads_share_the_experts(monkeypatch, choice, dtype, threads):
    counts = [4, 0, 50, 1, 9, 0, 2]
    arguments = make(counts, 40, 12, dtype)
    with torch_threads(1):
        expected = by_kernel(choice, arguments[0], counts, *arguments[1:])
    monkeypatch.setenv(VARIABLE, choice)
    kernel, calls = grouped_linear.load_kernel(), []

    def noting(*arguments):
        calls.append((threading.get_ident(), arguments[5]))
        return kernel(*arguments)

    monkeypatch.setattr(grouped_linear, "load_kernel", lambda: noting)
    with torch_threads(threads):
        result = by_kernel(choice, arguments[0], counts, *arguments[1:])
    assert torch.equal(result, expected)
    shares = grouped_linear._shares(np.array(counts), ANY_ROWS, threads)
    assert sorted(experts for _, experts in calls) == sorted(end - first for first, end in shares)
    assert len({thread for thread, _ in calls}) > 1


@examples(200)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 12))
@example([60, 60, 60, 0, 0, 0, 0, 0, 0], 3)
def test_shares_are_all_experts_once_and_of_about_as_much_work(counts, threads):
    parts = grouped_linear._shares(np.array(counts), ANY_ROWS, threads)
    assert len(parts) <= threads
    assert [expert for first, end in parts for expert in range(first, end)] == list(range(len(counts)))
    work = [8 * (count > 0) + count for count in counts]  # a weight's reading, and its rows
    for first, end in parts:
        assert sum(work[first:end]) <= sum(work) / threads + max(work)


@pytest.mark.parametrize("choice", WAYS)
def test_not_a_number_is_not_lost(monkeypatch, choice):
    monkeypatch.setenv(VARIABLE, choice)
    counts = [1, 2, FEW_ROWS + 1]
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight, bias = make(counts, 8, 4, dtype)
        rows[1, 3], rows[2, 0], rows[-1, 0] = float("nan"), float("inf"), float("nan")
        results = [linear(rows, counts, weight, bias, relu=True)]
        if choice != "off":
            results.append(by_kernel(choice, rows, counts, weight, bias, relu=True))
        for result in results:
            assert result[1].isnan().all() and result[2].isinf().any() and result[-1].isnan().all()
            assert result[0].isfinite().all() and result[3:-1].isfinite().all()


@pytest.mark.parametrize("change", ["outputs", "inputs", "bias"])
def test_misfits_are_refused(change):
    counts = [2, 1, 3]
    rows, weight, bias = make(counts, 8, 4)
    outputs = rows.new_empty(6, 3 if change == "outputs" else 4)
    if change == "inputs":
        rows = rows[:, :7]
    elif change == "bias":
        bias = bias[:, :3]
    with pytest.raises(ValueError, match=r"must fit the weight \(3, 4, 8\)"):
        grouped_linear.grouped_linear(rows, weight, bias, groups_of(counts), outputs)


@pytest.mark.parametrize("counts", ([2, 1, 4], [2, 4]))
def test_counts_that_do_not_sum_to_the_rows_are_refused(counts):
    experts = ResidentExperts(len(counts), 8, 4).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="must sum to the 5 rows, got"):
        experts(torch.ones(5, 8), counts)


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_rows_come_from_and_go_anywhere_and_weights_lie_in_any_slot(choice, dtype):
    """Bit by bit what rows and weights in order give, and nothing else is touched."""
    counts, sources, targets, slots = [2, FEW_ROWS + 3, 5], [60, 2, 0], [0, 5, 70], [3, 0, 1]
    rows, weight, bias = make([70, 0, 0, 0], 37, 11, dtype)
    outputs = rows.new_full((80, 11), float("nan"))
    groups = Groups(*(np.array(each, np.int32) for each in (sources, targets, counts, slots)), sum(counts))
    with asking_for(choice):
        grouped_linear.grouped_linear(rows, weight, bias, groups, outputs)
        for count, source, target, slot in zip(counts, sources, targets, slots, strict=True):
            its = slice(slot, slot + 1)
            alone = linear(rows[source : source + count].clone(), [count], weight[its].clone(), bias[its].clone())
            assert torch.equal(outputs[target : target + count], alone)
            outputs[target : target + count] = float("nan")
    assert outputs.isnan().all()


def test_mixed_types_are_refused():
    rows, weight, bias = make([2], 8, 4)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(rows.bfloat16(), [2], weight, bias)


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
