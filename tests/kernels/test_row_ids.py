"""Rows that kernels read by their numbers, beside the same rows copied into the experts' order."""

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import FEW_ROWS, KERNELS, WAYS, asking_for, make, make_pool
from quantized_calls import random_pool

from fairseq_moe_ext.experts.schedule import AllResident, run_steps
from fairseq_moe_ext.kernels.cpu_kernel import DTYPES, Groups, Kernel, Linear, _library
from fairseq_moe_ext.kernels.grouped_mlp import grouped_mlp, reads_row_ids
from fairseq_moe_ext.kernels.offsets import DeviceCounts, Offsets

COUNTS = [3, 0, 1, FEW_ROWS + 2, 5]
NOBODYS = 4  # rows behind the last expert's, as of padding
SLOTS = torch.tensor([4, 0, 2, 1, -1], dtype=torch.int32)


def scattered(dim, dtype, tokens=40):
    """rows (T, dim), of which the last belongs to nobody, and the number of each of the experts' rows."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(tokens, dim, generator=generator).to(dtype)
    rows[-1] = float("nan")
    return rows, torch.randint(0, tokens - 1, (sum(COUNTS) + NOBODYS,), generator=generator)


def pool_named(kernel, dtype):
    return random_pool(8, 37, 20, len(COUNTS))[0] if kernel == "quantized" else make_pool(len(COUNTS), 37, 20, dtype)


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("kernel", ["loop", "quantized"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [F.relu, F.silu])
@pytest.mark.parametrize("slots", [None, SLOTS], ids=["", "slots"])
def test_rows_by_their_numbers_have_the_bits_of_rows_in_order(choice, kernel, dtype, activation, slots):
    rows, row_ids = scattered(37, dtype)
    pool, offsets = pool_named(kernel, dtype), Offsets.of_counts(COUNTS)
    with asking_for(choice):
        expected = torch.full((len(row_ids), 37), 7.0, dtype=dtype)
        grouped_mlp(kernel, rows[row_ids], offsets, slots, pool, activation, expected)
        assert reads_row_ids(kernel, rows) == (choice != "off" and dtype in DTYPES)
        if reads_row_ids(kernel, rows):
            found = torch.full_like(expected, 7.0)
            grouped_mlp(kernel, rows, offsets, slots, pool, activation, found, row_ids)
            assert torch.equal(found, expected)
        if slots is None:
            steps = AllResident().steps(DeviceCounts(offsets))
            found = run_steps(steps, kernel, rows, offsets, pool, activation, row_ids)
            assert torch.equal(found[: sum(COUNTS)], expected[: sum(COUNTS)]) and len(found) == len(row_ids)


@pytest.mark.parametrize("choice", KERNELS)
@pytest.mark.parametrize("row_ids", [[0, 1, 6], [0, -1, 2], [0, 1]], ids=str)
def test_a_row_that_there_is_not_is_refused(choice, row_ids):
    rows, weight, bias = make([3, 3], 8, 4)
    outputs = rows.new_zeros(3, 4)
    groups = Groups([0, 1], [0, 1], [1, 2], [0, 1], torch.tensor(row_ids))
    with pytest.raises(ValueError, match="groups and row ids must lie within the 6 rows, 3 outputs and 2 slots"):
        Kernel(_library(), choice).run(rows, [Linear(weight, bias)], groups, outputs)
    assert not outputs.any()
