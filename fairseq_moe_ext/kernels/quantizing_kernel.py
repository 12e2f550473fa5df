"""The C function of cpu/quantizing.h: weights -> the planes of a quantised linear layer.

Legend: M = outputs, K = inputs, G = groups of inputs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.block import GROUP, QuantizedLinear
from fairseq_moe_ext.kernels.cpu_kernel import DTYPES, Kernel, address_of, can_be_read, load_kernel, team


def quantizer_for(layer: QuantizedLinear, weight: Tensor) -> QuantizingKernel | None:
    """What C does for these tensors; None where PyTorch must."""
    fits = weight.dtype in DTYPES and can_be_read(weight, layer.codes, layer.scales, layer.units)
    kernel = load_kernel() if fits else None
    return None if kernel is None else _quantizer(kernel)


class QuantizingKernel:
    """The compiled function; all tensors lie on the CPU."""

    def __init__(self, kernel: Kernel):
        self._run, self._instructions = kernel.function("quantize_weight"), kernel.number

    def run(
        self, layer: QuantizedLinear, weight: Tensor, candidates: Sequence[float], columns: Tensor | None = None
    ) -> bool:
        """weight (M, K), of one of DTYPES and any strides, into codes, scales and units of a layer of one slot, as
        experts/quantize.py has it; PyTorch's threads share it. Whether all weights are finite: else the layer has
        nothing of use.

        candidates: of int4; columns: (G, 64) float32, what an error in each input costs, None: 1. ValueError where
        something does not fit.
        """
        outputs, groups, group_bytes = layer.codes.shape[1:]
        if weight.shape != (outputs, layer.inputs) or columns is not None and columns.shape != (groups, GROUP):
            given = None if columns is None else tuple(columns.shape)
            raise ValueError(
                f"weight and columns must be {(outputs, layer.inputs)} and {(groups, GROUP)}, got "
                f"{tuple(weight.shape)} and {given}"
            )
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        steps = array("f", candidates)
        given = (
            *(outputs, layer.inputs, weight.stride(0), len(steps), weight.data_ptr()),
            0 if columns is None else address_of(columns, "columns", torch.float32),
            steps.buffer_info()[0],
            address_of(layer.codes[0], "codes", layer.codes.dtype),
            address_of(layer.scales[0], "scales", torch.float16),
            address_of(layer.units[0], "units", torch.float32),
        )
        bits = group_bytes * 8 // GROUP
        call = array("q", (*team(), self._instructions, bits, DTYPES[weight.dtype], *given))
        error = self._run(call.buffer_info()[0])
        if error == -1:
            raise MemoryError("no memory for the rows that are quantised")
        return not error


@lru_cache
def _quantizer(kernel: Kernel) -> QuantizingKernel:
    return QuantizingKernel(kernel)
