"""One linear layer per expert: the C kernel and PyTorch's product beside one row at a time."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.gating import ResidentExperts, grouped_linear
from fairseq_moe_ext.gating.grouped_linear import FEW_ROWS

CPU = torch.device("cpu")


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
    return (result.relu() if relu else result).to(rows.dtype)


@pytest.fixture
def without_kernel(monkeypatch):
    monkeypatch.setattr(grouped_linear, "load_kernel", lambda: None)


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler here")
def test_the_installation_compiles_the_kernel():
    assert grouped_linear.load_kernel() is not None
    assert grouped_linear.most_rows(torch.float32, CPU) == FEW_ROWS
    assert grouped_linear.most_rows(torch.float64, CPU) == 0


@examples(150)
@given(st.lists(st.sampled_from((0, 0, 1, 2, 3, 4, 5, 7, 9, FEW_ROWS, FEW_ROWS + 1)), min_size=1, max_size=6),
       st.integers(1, 40), st.integers(1, 13), st.booleans(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_each_row_goes_through_its_expert(counts, inputs, outputs, relu, dtype):
    rows, weight, bias = make(counts, inputs, outputs, dtype)
    result = grouped_linear.grouped_linear(rows, counts, weight, bias, relu)
    torch.testing.assert_close(result, one_by_one(rows, counts, weight, bias, relu))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("relu", (True, False))
def test_pytorchs_product_stands_in_for_the_kernel(without_kernel, dtype, relu):
    counts = [3, 0, 1, 60, 2]
    rows, weight, bias = make(counts, 24, 10, dtype)
    result = grouped_linear.grouped_linear(rows, counts, weight, bias, relu)
    torch.testing.assert_close(result, one_by_one(rows, counts, weight, bias, relu))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("inputs", (64, 37))
def test_a_row_has_one_result_whoever_shares_its_expert(dtype, inputs):
    counts = [FEW_ROWS, 5]
    rows, weight, bias = make(counts, inputs, 11, dtype)
    expected = grouped_linear.grouped_linear(rows, counts, weight, bias)
    for number in (1, 2, 3, 4, 5, 7):
        few = grouped_linear.grouped_linear(rows[:number], [number, 0], weight, bias)
        assert torch.equal(few, expected[:number]), number
    alone = grouped_linear.grouped_linear(rows[FEW_ROWS:], [5], weight[1:], bias[1:])
    assert torch.equal(alone, expected[FEW_ROWS:])


@pytest.mark.parametrize("threads", (2, 3, 8))
def test_threads_share_the_experts(threads):
    counts = [4, 0, 50, 1, 9, 0, 2]
    arguments = make(counts, 40, 12)
    expected = grouped_linear.grouped_linear(arguments[0], counts, *arguments[1:])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = grouped_linear.grouped_linear(arguments[0], counts, *arguments[1:])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result, expected)


@examples(60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 12))
def test_shares_are_all_experts_once(counts, threads):
    parts = grouped_linear._shares(counts, threads)
    assert len(parts) <= threads
    assert [expert for first, end in parts for expert in range(first, end)] == list(range(len(counts)))


def test_not_a_number_is_not_lost():
    counts = [1, 2]
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight, bias = make(counts, 8, 4, dtype)
        rows[1, 3], rows[2, 0] = float("nan"), float("inf")
        result = grouped_linear.grouped_linear(rows, counts, weight, bias, relu=True)
        assert result[1].isnan().all() and result[2].isinf().any() and result[0].isfinite().all()


@pytest.mark.parametrize("change", ["counts", "experts", "inputs", "bias"])
def test_misfits_are_refused(change):
    counts = [2, 1, 3]
    rows, weight, bias = make(counts, 8, 4)
    if change == "counts":
        counts = [2, 1, 4]
    elif change == "experts":
        counts = [2, 4]
    elif change == "inputs":
        rows = rows[:, :7]
    else:
        bias = bias[:, :3]
    with pytest.raises(ValueError, match=r"must fit the weight \(3, 4, 8\)"):
        grouped_linear.grouped_linear(rows, counts, weight, bias)


def test_mixed_types_are_refused():
    rows, weight, bias = make([2], 8, 4)
    with pytest.raises(RuntimeError, match="dtype"):
        grouped_linear.grouped_linear(rows.bfloat16(), [2], weight, bias)


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
