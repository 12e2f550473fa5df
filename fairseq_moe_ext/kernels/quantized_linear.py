"""One quantised linear layer or embedding alone: the same weights and the same arithmetic as the experts'
(quantized.py). Legend: M = outputs, K = inputs, V = rows of an embedding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.kernels.block import QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import Groups
from fairseq_moe_ext.kernels.quantized import apply_layer
from fairseq_moe_ext.kernels.quantized_kernel import kernel_for


def multiply(x: Tensor, pool: QuantizedPool) -> Tensor:
    """x (..., K) of float32, float16 or bfloat16 -> (..., M) in its dtype, by a pool of one linear layer."""
    rows = x.reshape(-1, x.size(-1)).contiguous()
    outputs = rows.new_empty(rows.size(0), pool.block.planes[0].outputs)
    kernel = kernel_for(rows, outputs, pool)
    if kernel is None:
        (layer,) = pool.layers
        outputs.copy_(apply_layer(layer, rows.float()))
    else:
        kernel.run(rows, pool, Groups.of_one(rows.size(0)), outputs, None, [0])
    return outputs.view(*x.shape[:-1], outputs.size(1))


def multiply_widened(x: Tensor, pool: QuantizedPool) -> Tensor:
    """As `multiply`, with the weight in the dtype of x, and x as it is: the reference."""
    (layer,) = pool.layers
    return F.linear(x, layer.weight()[0].to(x.dtype), layer.bias[0].to(x.dtype))


def look_up(ids: Tensor, pool: QuantizedPool) -> Tensor:
    """ids (...) int64 below V -> their rows (..., K) of the layer's weight (V, K), float32."""
    (layer,) = pool.layers
    return layer.of_outputs(ids.reshape(-1)).weight()[0].view(*ids.shape, layer.inputs)
