"""A quantised expert's block read, written and computed number by number, as docs/internals.md describes it."""

import math
import struct

import numpy as np

GROUP = 64


def _up(size):
    return (size + 63) // 64 * 64


def planes(bits, model_dim, hidden_dim):
    """[(M, K, G, where codes, scales, units and bias begin)] of fc1 and fc2, and the block's bytes."""
    found, at = [], 0
    for outputs, inputs in ((hidden_dim, model_dim), (model_dim, hidden_dim)):
        groups = -(-inputs // GROUP)
        codes = at
        scales = _up(codes + outputs * groups * (64 if bits == 8 else 32))
        units = _up(scales + 2 * outputs * groups)
        bias = _up(units + 4 * outputs)
        at = _up(bias + 4 * outputs)
        found.append((outputs, inputs, groups, codes, scales, units, bias))
    return found, at


def read(bits, model_dim, hidden_dim, data):
    """bytes -> per layer (weight (M, K), bias (M,)) as float64."""
    layers = []
    for outputs, inputs, groups, codes, scales, units, bias in planes(bits, model_dim, hidden_dim)[0]:
        weight = np.zeros((outputs, inputs))
        for m in range(outputs):
            unit = struct.unpack_from("<f", data, units + 4 * m)[0]
            for k in range(inputs):
                g, i = divmod(k, GROUP)
                scale = struct.unpack_from("<e", data, scales + 2 * (m * groups + g))[0]
                if bits == 8:
                    q = struct.unpack_from("<b", data, codes + (m * groups + g) * 64 + i)[0]
                else:
                    byte = data[codes + (m * groups + g) * 32 + i % 32]
                    q = (byte % 16 if i < 32 else byte // 16) - 8
                weight[m, k] = unit * scale * q
        layers.append((weight, np.array(struct.unpack_from(f"<{outputs}f", data, bias), dtype=np.float64)))
    return layers


def made(bits, model_dim, hidden_dim, seed=0):
    """Random bytes that the format allows: codes of padding and gaps are zero, scales like a real expert's."""
    generator = np.random.default_rng(seed)
    layers, size = planes(bits, model_dim, hidden_dim)
    data = bytearray(size)
    for outputs, inputs, groups, codes, scales, units, bias in layers:
        for m in range(outputs):
            struct.pack_into("<f", data, units + 4 * m, 2.0 ** generator.integers(-9, -5))
            struct.pack_into("<f", data, bias + 4 * m, generator.normal())
            for g in range(groups):
                sign = generator.choice((-1, 1)) if bits == 4 else 1
                struct.pack_into("<e", data, scales + 2 * (m * groups + g), sign * generator.uniform(0.5, 2.0))
                its = min(GROUP, inputs - g * GROUP)
                if bits == 8:
                    q = [*generator.integers(-127, 128, its), *[0] * (GROUP - its)]
                    struct.pack_into("<64b", data, codes + (m * groups + g) * 64, *q)
                else:
                    q = [*generator.integers(-8, 8, its), *[0] * (GROUP - its)]
                    packed = [int(q[i] + 8 + 16 * (q[i + 32] + 8)) for i in range(32)]
                    struct.pack_into("<32B", data, codes + (m * groups + g) * 32, *packed)
    return bytes(data)


def linear(weight, bias, row):
    """A layer on one row: the row quantised per group, everything else in double precision."""
    row = np.float32(row)
    groups = -(-len(row) // GROUP)
    total = np.array(bias)
    for g in range(groups):
        part = slice(g * GROUP, (g + 1) * GROUP)
        largest = max(abs(value) for value in row[part])
        if math.isnan(sum(row[part])) or math.isinf(largest):
            total += np.nan
        elif largest >= np.float32(1e-30):
            factor, scale = np.float32(127) / largest, largest / np.float32(127)
            codes = [max(-127, min(127, float(np.rint(value * factor)))) for value in row[part]]
            total += weight[:, part] @ (float(scale) * np.array(codes))
    return total


def mlp(layers, row, activation):
    """fc1, activation and fc2 on one row -> (D,) float64."""
    (fc1, fc1_bias), (fc2, fc2_bias) = layers
    return linear(fc2, fc2_bias, activation(linear(fc1, fc1_bias, row)))
