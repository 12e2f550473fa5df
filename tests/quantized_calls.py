"""Blocks of quantised experts by NumPy, and what one layer of theirs gives, both after the format's description
(docs/internals.md) alone: for the tests of the C kernel.

Legend: M = outputs, K = inputs, G = groups, D = model dim, F = hidden dim.
"""

from dataclasses import dataclass

import naive_block
import numpy as np
import torch

from fairseq_moe_ext.kernels import cpu_kernel
from fairseq_moe_ext.kernels.block import Block, QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import Groups, Kernel
from fairseq_moe_ext.kernels.quantized_kernel import FC1, FC2, QuantizedKernel

GROUP = 64


@dataclass
class Layer:
    """q (M, G, 64), scales (M, G) float16, units (M,) and bias (M,) float32; inputs: K."""

    q: np.ndarray
    scales: np.ndarray
    units: np.ndarray
    bias: np.ndarray
    inputs: int


def random_layer(bits, outputs, inputs, generator):
    groups, least = -(-inputs // GROUP), -127 if bits == 8 else -8
    q = generator.integers(least, 128 if bits == 8 else 8, (outputs, groups, GROUP))
    q.reshape(outputs, -1)[:, inputs:] = 0
    scales = generator.uniform(0.5, 2, (outputs, groups)) * generator.choice([1, 1, -1 if bits == 4 else 1, 0], groups)
    q[scales == 0] = 0
    units = 2.0 ** generator.integers(-20, 3, outputs)
    return Layer(q, np.float16(scales), np.float32(units), np.float32(generator.normal(size=outputs)), inputs)


def pool_of(bits, model_dim, hidden_dim, layers):
    """[(fc1, fc2) of an expert] -> a pool that has them in its slots."""
    planes, size = naive_block.planes(bits, model_dim, hidden_dim)
    blocks = np.zeros((len(layers), size), np.uint8)
    for block, pair in zip(blocks, layers, strict=True):
        for layer, (_, _, _, codes, scales, units, bias) in zip(pair, planes, strict=True):
            packed = np.int8(layer.q)
            if bits == 4:
                shifted = np.uint8(layer.q + 8)
                packed = shifted[..., :32] | shifted[..., 32:] << 4
            its_planes = ((codes, packed), (scales, layer.scales), (units, layer.units), (bias, layer.bias))
            for start, values in its_planes:
                data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
                block[start : start + len(data)] = data
    return QuantizedPool(Block(bits, model_dim, hidden_dim), torch.from_numpy(blocks))


def random_pool(bits, model_dim, hidden_dim, experts, seed=0):
    """A pool, and its experts' layers."""
    generator = np.random.default_rng(seed)
    dims = (hidden_dim, model_dim), (model_dim, hidden_dim)
    layers = [tuple(random_layer(bits, *each, generator) for each in dims) for _ in range(experts)]
    return pool_of(bits, model_dim, hidden_dim, layers), layers


def expected_linear(layer, rows):
    """rows (n, K) -> outputs (n, M) in float64, and what float32 sums may lose of each; of one group, outputs are
    float32 and nothing may be lost. Codes and integer sums are exact, scales of products are rounded to float32."""
    outputs, groups, _ = layer.q.shape
    padded = np.zeros((len(rows), groups * GROUP), np.float32)
    padded[:, : layer.inputs] = rows.float().numpy()
    padded = padded.reshape(len(rows), groups, GROUP)
    total, size = np.zeros((len(rows), outputs)), np.zeros((len(rows), outputs))
    for group in range(groups):
        x = padded[:, group]
        with np.errstate(all="ignore"):
            most = np.abs(x).max(1)
            codes = np.clip(np.rint(x * (np.float32(127) / most)[:, None]), -127, 127)
        scale = most / np.float32(127)
        codes[(most < 1e-30) | ~np.isfinite(most)] = 0
        scale[most < 1e-30] = 0
        scale[~np.isfinite(most)] = np.nan
        sums = np.int64(codes) @ np.int64(layer.q[:, group]).T
        terms = np.float64(np.float32(layer.scales[:, group]) * scale[:, None]) * sums
        total, size = total + terms, size + np.abs(terms)
    if groups == 1:
        return np.float64(layer.units * np.float32(total) + layer.bias), np.zeros_like(size)
    return layer.units * total + layer.bias, 2**-23 * (groups * layer.units * size + np.abs(layer.bias))


def quantized_kernel(choice, library=None):
    return QuantizedKernel(Kernel(library or cpu_kernel._library(), choice))


def by_layer(kernel, rows, counts, pool, layer, activation=None, dtype=torch.float32, slots=None):
    """One layer by the C kernel."""
    starts = np.cumsum(counts) - counts
    outputs = pool.block.hidden_dim if layer == FC1 else pool.block.model_dim
    found = torch.full((len(rows), outputs), torch.nan, dtype=dtype)
    groups = Groups(starts, starts, counts, range(len(counts)) if slots is None else slots)
    kernel.run(rows, pool, groups, found, activation, [layer])
    return found


def assert_is_linear(kernel, rows, counts, pool, layers, layer):
    """By `kernel` what the description says, of experts in their slots."""
    found = by_layer(kernel, rows, counts, pool, layer)
    for its, part, result in zip(layers, rows.split(counts), found.split(counts), strict=True):
        expected, loss = expected_linear(its[layer], part)
        np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
        too_far = np.abs(result.double().numpy() - expected) > loss
        assert not too_far.any(), (result[too_far], expected[too_far])
    return found


def assert_two_layers_are_one_and_one(kernel, rows, counts, pool, activation):
    """Bit by bit; gives the outputs, in the rows' dtype."""
    hidden = by_layer(kernel, rows, counts, pool, FC1, activation)
    expected = by_layer(kernel, hidden, counts, pool, FC2, dtype=rows.dtype)
    starts, found = np.cumsum(counts) - counts, torch.full_like(expected, torch.nan)
    kernel.run(rows, pool, Groups(starts, starts, counts, range(len(counts))), found, activation)
    assert torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))
    return found
