"""One quantised linear layer or embedding, beside a twin that computes number by number."""

import naive_block
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_calls import WAYS, asking_for

from fairseq_moe_ext.kernels.block import LinearBlock, QuantizedPool
from fairseq_moe_ext.kernels.quantized_linear import look_up, multiply, multiply_widened

BITS = pytest.mark.parametrize("bits", [8, 4])
DIMS = pytest.mark.parametrize("outputs, inputs", [(33, 70), (64, 128), (1, 1), (300, 64)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def pool_of(bits, outputs, inputs):
    """A pool, and its weight and bias as the naive reader has them."""
    data, block = naive_block.made(bits, inputs, outputs), LinearBlock(bits, outputs, inputs)
    of_layer = torch.tensor(np.frombuffer(data[: block.nbytes], np.uint8))[None]
    return QuantizedPool(block, of_layer), *naive_block.read(bits, inputs, outputs, data)[0]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("choice", WAYS)
@BITS
@DIMS
def test_multiply_computes_what_the_naive_twin_does(choice, bits, outputs, inputs):
    pool, weight, bias = pool_of(bits, outputs, inputs)
    x = random(2, 3, inputs)
    with asking_for(choice):
        found = multiply(x, pool)
    assert found.shape == (2, 3, outputs)
    for row, output in zip(x.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), strict=True):
        expected = naive_block.linear(weight, bias, row)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("choice", WAYS)
@BITS
@DTYPES
def test_a_row_has_the_bits_that_it_has_alone(choice, bits, dtype):
    pool, *_ = pool_of(bits, 33, 70)
    x = random(40, 70, dtype=dtype)
    with asking_for(choice):
        found = multiply(x, pool)
        assert found.dtype == dtype and torch.equal(found, multiply(x.float(), pool).to(dtype))
        assert torch.equal(found, torch.cat([multiply(row, pool) for row in x.split(1)]))
        assert torch.equal(multiply(x.t().contiguous().t(), pool), found)


@pytest.mark.parametrize("choice", WAYS)
def test_a_single_row_and_token_have_no_other_dimension(choice):
    """As with nn.Linear and nn.Embedding."""
    pool, *_ = pool_of(8, 33, 70)
    row = random(70)
    with asking_for(choice):
        assert torch.equal(multiply(row, pool), multiply(row[None], pool)[0])
    assert torch.equal(look_up(torch.tensor(3), pool), look_up(torch.tensor([3]), pool)[0])


@pytest.mark.parametrize("choice", WAYS)
def test_no_rows(choice):
    pool, *_ = pool_of(8, 33, 70)
    with asking_for(choice):
        assert multiply(torch.empty(2, 0, 70), pool).shape == (2, 0, 33)


@BITS
@DIMS
def test_rows_are_looked_up_exactly(bits, outputs, inputs):
    pool, weight, _ = pool_of(bits, outputs, inputs)
    ids = torch.randint(outputs, (3, 4), generator=torch.Generator().manual_seed(1))
    found = look_up(ids, pool)
    assert found.shape == (3, 4, inputs) and np.array_equal(found.double().numpy(), weight[ids.numpy()])
    assert look_up(ids[:0], pool).shape == (0, 4, inputs)


@BITS
@DTYPES
def test_the_reference_takes_rows_as_they_are(bits, dtype):
    pool, weight, bias = pool_of(bits, 33, 70)
    x = random(5, 70, dtype=dtype)
    expected = F.linear(x, torch.tensor(weight).to(dtype), torch.tensor(bias).to(dtype))
    assert torch.equal(multiply_widened(x, pool), expected)
