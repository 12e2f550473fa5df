"""The C function of cpu/quantized.h: int8 and int4 experts on a CPU, at any number of rows.

Legend: S = slots, N = rows, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.block import Block, QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import (
    ACTIVATIONS,
    ANY_ROWS,
    DTYPES,
    NAMES,
    Groups,
    Kernel,
    address_of,
    can_be_read,
    load_kernel,
)

FC1, FC2 = 0, 1


def kernel_for(rows: Tensor, outputs: Tensor, pool: QuantizedPool) -> QuantizedKernel | None:
    """What C does for these tensors; None where PyTorch must."""
    fits = rows.dtype in DTYPES and outputs.dtype in DTYPES and can_be_read(rows, outputs, pool.blocks)
    kernel = load_kernel() if fits else None
    return None if kernel is None else _kernel(kernel)


def instructions_of(kernel: Kernel) -> str:
    """What quantised experts run on: of AVX-512 VNNI only, else AVX2."""
    if kernel.instructions != "avx512":
        return kernel.name
    return "AVX-512 VNNI" if kernel.library.has_vnni() else NAMES["avx2"]


class QuantizedKernel:
    """The compiled function; all tensors lie on the CPU and are contiguous."""

    def __init__(self, kernel: Kernel):
        self._kernel = kernel
        self._run, self._touch = kernel.function("run_quantized"), kernel.function("touch_quantized")

    def run(
        self,
        rows: Tensor,
        pool: QuantizedPool,
        groups: Groups,
        outputs: Tensor,
        activation: Activation | None,
        layers: Sequence[int] = (FC1, FC2),
    ) -> None:
        """The groups' rows through fc1, activation (a key of ACTIVATIONS) and fc2, or through one of the two layers
        alone, then with the activation behind it, into the groups' rows of outputs.

        rows (N, D or F) and outputs (N', F or D) are each of one of DTYPES; hidden features between the two layers are
        float32. PyTorch's threads share every expert. A row's outputs depend on the row and its expert alone, bit by
        bit. ValueError where something does not fit.
        """
        block, blocks = pool.block, pool.blocks
        if blocks.dim() != 2 or blocks.shape[1] != block.nbytes:
            raise ValueError(f"blocks must be (slots, {block.nbytes}), got {tuple(blocks.shape)}")
        planes = _planes(block)
        features, outs = planes[layers[0]][4], planes[layers[-1]][5]
        if rows.shape[1] != features or outputs.shape[1] != outs:
            raise ValueError(
                f"rows must have {features} features and outputs {outs}, got {rows.shape[1]} and {outputs.shape[1]}"
            )
        if rows.dtype not in DTYPES or outputs.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"rows and outputs must be of one of {known}, got {rows.dtype} and {outputs.dtype}")
        given = [address_of(rows, "rows", rows.dtype), address_of(outputs, "outputs", outputs.dtype)]
        start = address_of(blocks, "blocks", torch.uint8)
        for layer in layers:
            *begins, inputs, its_outputs = planes[layer]
            follows = activation if layer == layers[0] else None
            given += [start + begin for begin in begins]
            given += block.nbytes, inputs, its_outputs, ACTIVATIONS[follows]
        if len(layers) == 1:
            given += [0] * 8
        types = DTYPES[rows.dtype], DTYPES[outputs.dtype]
        sizes = rows.shape[0], outputs.shape[0], blocks.shape[0]
        self._kernel.call(self._run, groups, ANY_ROWS, sizes, block.bits, *types, len(layers), *given)

    def touch_pages(self, pool: QuantizedPool) -> None:
        """As `Kernel.touch_pages`: the codes and scales of a new pool."""
        start, nbytes = address_of(pool.blocks, "blocks", torch.uint8), pool.block.nbytes
        given = [0, 0]
        for *begins, inputs, outputs in _planes(pool.block):
            given += [*(start + begin for begin in begins), nbytes, inputs, outputs, ACTIVATIONS[None]]
        float32 = DTYPES[torch.float32]
        its = pool.block.bits, float32, float32, len(pool.block.planes), *given
        self._kernel.call(self._touch, Groups([], [], [], []), ANY_ROWS, (0, 0, pool.blocks.shape[0]), *its)


@lru_cache
def _kernel(kernel: Kernel) -> QuantizedKernel:
    return QuantizedKernel(kernel)


@lru_cache
def _planes(block: Block) -> tuple[tuple[int, ...], ...]:
    """Of fc1 and fc2: where codes, scales, units and bias begin in a block, inputs and outputs."""
    return tuple((its.codes, its.scales, its.units, its.bias, its.inputs, its.outputs) for its in block.planes)
