"""A quantised expert's block: where its planes lie, and what its weights are."""

import naive_block
import numpy as np
import pytest
import torch

from fairseq_moe_ext.kernels.block import Block, LinearBlock

DIMS = [(1, 1), (64, 128), (70, 33), (200, 64)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_widen_reads_what_the_naive_reader_does(bits, dims):
    block = Block(bits, *dims)
    data = [naive_block.made(bits, *dims, seed) for seed in range(3)]
    assert {len(each) for each in data} == {block.nbytes}
    pool = torch.tensor(np.stack([np.frombuffer(each, np.uint8) for each in data]))
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (part.double().numpy() for part in block.widen(pool))
    for expert, each in enumerate(data):
        (fc1, bias1), (fc2, bias2) = naive_block.read(bits, *dims, each)
        for found, expected in ((fc1_weight, fc1), (fc1_bias, bias1), (fc2_weight, fc2), (fc2_bias, bias2)):
            assert found.dtype == np.float64 and np.array_equal(found[expert], expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_planes_begin_at_multiples_of_64_and_layers_are_views_of_them(bits, dims):
    block = Block(bits, *dims)
    pool = torch.zeros(2, block.nbytes, dtype=torch.uint8)
    expected, _ = naive_block.planes(bits, *dims)
    for layer, planes, (*_, codes, scales, units, bias) in zip(block.layers(pool), block.planes, expected, strict=True):
        starts = [getattr(layer, name).data_ptr() - pool.data_ptr() for name in ("codes", "scales", "units", "bias")]
        assert starts == [codes, scales, units, bias]
        assert starts == [planes.codes, planes.scales, planes.units, planes.bias]
        assert not any(start % 64 for start in starts)
    block.layers(pool)[1].bias[1] = 1.0
    assert pool[1].any() and not pool[0].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_a_linear_layer_alone_lies_as_fc1_does(bits, dims):
    model_dim, hidden_dim = dims
    data, block = naive_block.made(bits, *dims), LinearBlock(bits, hidden_dim, model_dim)
    (*_, fc2_codes, _, _, _) = naive_block.planes(bits, *dims)[0][1]
    assert block.nbytes == fc2_codes
    weight, bias = block.widen(torch.tensor(np.frombuffer(data[:fc2_codes], np.uint8))[None])
    expected, expected_bias = naive_block.read(bits, *dims, data)[0]
    assert np.array_equal(weight[0].double().numpy(), expected)
    assert np.array_equal(bias[0].double().numpy(), expected_bias)


def test_a_block_takes_as_many_bytes_as_its_bits_scales_units_and_biases():
    for bits, mebibytes in ((8, 33.0), (4, 17.0)):  # NLLB-54B's experts
        units_and_biases = 2 * 4 * (2048 + 8192)
        assert Block(bits, 2048, 8192).nbytes == mebibytes * 2**20 + units_and_biases


@pytest.mark.parametrize("bits, dims, message", [
    (2, (64, 64), "bits must be one of 8, 4, got 2"),
    (8, (0, 64), "dims must be at least 1, got model dim 0, hidden dim 64"),
])
def test_a_block_refuses_other_bits_and_dims(bits, dims, message):
    with pytest.raises(ValueError, match=message):
        Block(bits, *dims)
    with pytest.raises(ValueError, match=message.replace("model dim", "outputs").replace("hidden dim", "inputs")):
        LinearBlock(bits, *dims)


@pytest.mark.parametrize("pool", [
    torch.zeros(2, 64, dtype=torch.uint8),
    torch.zeros(2, Block(8, 4, 4).nbytes, dtype=torch.int8),
    torch.zeros(2, 2 * Block(8, 4, 4).nbytes, dtype=torch.uint8)[:, ::2],
], ids=["bytes", "dtype", "strides"])
def test_layers_refuse_another_pool(pool):
    with pytest.raises(ValueError, match=r"pool must be contiguous uint8 \(slots, "):
        Block(8, 4, 4).layers(pool)
