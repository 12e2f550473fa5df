"""A row has one result, bit by bit, wherever it lies and whoever shares the call, for each of fairseq's activations.

PyTorch rounds the values that its vector instructions leave over differently: many numbers of rows and odd dims are
tried, and an activation that does so on any CPU and for any dims.
"""

import pytest
import torch
from activations import ACTIVATIONS

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.kernels.activations import activate_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("hidden_dim", [1, 7, 16, 37, 64])
def test_a_rows_activation_does_not_depend_on_its_place_nor_on_others(name, dtype, hidden_dim):
    values = torch.randn(23, hidden_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    alone = torch.cat([activate_rows(row.clone(), ACTIVATIONS[name]) for row in values.split(1)])
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(alone, ACTIVATIONS[name](values), rtol=rounding, atol=rounding)
    for first in (0, 1, 5):
        for count in (1, 2, 3, 7, 18):
            found = activate_rows(values[first : first + count].clone(), ACTIVATIONS[name])
            assert torch.equal(found, alone[first : first + count]), (first, count)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_threads_do_not_change_a_row(name):
    """PyTorch cuts a large tensor into a part per thread, and leaves values over in each."""
    values = torch.randn(40, 1001, generator=torch.Generator().manual_seed(0))
    expected = activate_rows(values.clone(), ACTIVATIONS[name])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(activate_rows(values.clone(), ACTIVATIONS[name]), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_experts_result_does_not_depend_on_the_others_called_with_it(name, dtype):
    counts = [3, 0, 1, 30, 2]
    experts = ResidentExperts(5, 9, 37, ACTIVATIONS[name]).to(dtype).eval()
    rows = torch.randn(sum(counts), 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        together = experts(rows, counts).split(counts)
        for expert, chunk in enumerate(rows.split(counts)):
            alone = [len(chunk) if other == expert else 0 for other in range(5)]
            assert torch.equal(experts(chunk, alone), together[expert]), expert
