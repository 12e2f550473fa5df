"""A block of bytes, a quantised expert or one linear layer: where each of its planes lies, and what its weights are.

An expert is one contiguous run of bytes, fc1's planes and then fc2's, each beginning at a multiple of 64 bytes with
zeros in the gaps: codes | scales | units | bias. A linear layer of M outputs and K inputs has G = ceil(K / 64) groups
of 64 inputs, the last one padded with codes of value 0:

    weight[m, k] = units[m] * scales[m, k // 64] * q[m, k]

    codes   int8: 64 signed bytes per group, q from -127 to 127. int4: 32 bytes per group; byte i has element i in its
            low nibble and element i + 32 in its high one, each as q + 8, q from -8 to 7
    scales  (M, G) float16, in int4 also negative
    units   (M,) float32, a power of two per output
    bias    (M,) float32

Legend: S = slots of a pool, M = outputs, K = inputs, G = groups, C = bytes of a group's codes, D = model dim,
F = hidden dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

GROUP = 64  # inputs that share a scale
ALIGNMENT = 64  # bytes at which a plane begins, from its block's start
BITS = (8, 4)
LARGEST = {8: 127, 4: 7}  # of the codes' values q
SMALLEST = {8: -127, 4: -8}


@dataclass(frozen=True)
class Planes:
    """Where a linear layer's planes begin, in bytes from the block's start."""

    outputs: int
    inputs: int
    groups: int
    codes: int
    scales: int
    units: int
    bias: int


@dataclass(frozen=True)
class QuantizedLinear:
    """Of S experts, as views on a pool: codes (S, M, G, C) int8 or, of int4, uint8; scales (S, M, G) float16; units
    and bias (S, M) float32. inputs: K."""

    codes: Tensor
    scales: Tensor
    units: Tensor
    bias: Tensor
    inputs: int

    def group(self, number: int) -> Tensor:
        """q of one group of inputs, (S, M, 64) int8."""
        return _values_of(self.codes[:, :, number])

    def of_outputs(self, numbers: Tensor) -> QuantizedLinear:
        """The layer with the outputs of these numbers (N,) alone, a copy."""
        planes = (plane.index_select(1, numbers) for plane in (self.codes, self.scales, self.units, self.bias))
        return QuantizedLinear(*planes, self.inputs)

    def weight(self) -> Tensor:
        """(S, M, K) float32, exactly what the format says."""
        weight = _values_of(self.codes) * self.scales[..., None].float()  # has 18 bits: nothing is rounded
        weight *= self.units[:, :, None, None]
        return weight.flatten(2)[:, :, : self.inputs]


@dataclass(frozen=True)
class Blocks(ABC):
    """Linear layers whose planes follow one another. bits: 8 or 4. ValueError where these or the dims are out of
    range."""

    bits: int

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if min(map(min, self.dims)) < 1:
            given = ", ".join(f"{each.name.replace('_', ' ')} {getattr(self, each.name)}" for each in fields(self)[1:])
            raise ValueError(f"dims must be at least 1, got {given}")

    @property
    @abstractmethod
    def dims(self) -> tuple[tuple[int, int], ...]:
        """(M, K) of every layer."""

    @property
    def group_bytes(self) -> int:
        """C."""
        return GROUP * self.bits // 8

    @cached_property
    def planes(self) -> tuple[Planes, ...]:
        """Of every layer."""
        found, end = [], 0
        for outputs, inputs in self.dims:
            groups, begins = math.ceil(inputs / GROUP), [end]
            for size in (outputs * groups * self.group_bytes, 2 * outputs * groups, 4 * outputs, 4 * outputs):
                begins.append(_aligned(begins[-1] + size))
            *begins, end = begins
            found.append(Planes(outputs, inputs, groups, *begins))
        return tuple(found)

    @cached_property
    def nbytes(self) -> int:
        """Of one block, a multiple of 64."""
        last = self.planes[-1]
        return _aligned(last.bias + 4 * last.outputs)

    def layers(self, pool: Tensor) -> tuple[QuantizedLinear, ...]:
        """The layers of a pool (S, nbytes) uint8, whose bytes lie together: views, by which it can also be filled."""
        if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.size(1) != self.nbytes or not pool.is_contiguous():
            raise ValueError(
                f"pool must be contiguous uint8 (slots, {self.nbytes}), got {pool.dtype} {tuple(pool.shape)} with "
                f"strides {pool.stride()}"
            )
        return tuple(self._views(pool, planes) for planes in self.planes)

    def _views(self, pool: Tensor, at: Planes) -> QuantizedLinear:
        def plane(start: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return pool.narrow(1, start, math.prod(shape) * dtype.itemsize).view(dtype).unflatten(1, shape)

        return QuantizedLinear(
            plane(at.codes, torch.int8 if self.bits == 8 else torch.uint8, at.outputs, at.groups, self.group_bytes),
            plane(at.scales, torch.float16, at.outputs, at.groups),
            plane(at.units, torch.float32, at.outputs),
            plane(at.bias, torch.float32, at.outputs),
            at.inputs,
        )

    def widen(self, pool: Tensor) -> list[Tensor]:
        """pool (S, nbytes) -> per layer weight (S, M, K) and bias (S, M), float32."""
        return [part for layer in self.layers(pool) for part in (layer.weight(), layer.bias.clone())]


@dataclass(frozen=True)
class Block(Blocks):
    """An expert: fc1 and fc2."""

    model_dim: int
    hidden_dim: int

    @property
    def dims(self) -> tuple[tuple[int, int], ...]:
        """As `Blocks` has it."""
        return (self.hidden_dim, self.model_dim), (self.model_dim, self.hidden_dim)


@dataclass(frozen=True)
class LinearBlock(Blocks):
    """One linear layer."""

    outputs: int
    inputs: int

    @property
    def dims(self) -> tuple[tuple[int, int], ...]:
        """As `Blocks` has it."""
        return ((self.outputs, self.inputs),)


@dataclass(frozen=True)
class QuantizedPool:
    """S blocks (S, nbytes) uint8."""

    block: Blocks
    blocks: Tensor

    @cached_property
    def layers(self) -> tuple[QuantizedLinear, ...]:
        """Views on the blocks."""
        return self.block.layers(self.blocks)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _values_of(codes: Tensor) -> Tensor:
    """codes (..., 64) int8 or (..., 32) uint8 -> q (..., 64) int8."""
    if codes.dtype == torch.int8:
        return codes
    return torch.cat((codes & 15, codes >> 4), -1).to(torch.int8) - 8
