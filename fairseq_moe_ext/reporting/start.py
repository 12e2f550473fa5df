"""What happens once before the first pass of a served model, so that it is no part of a pass's time."""

from __future__ import annotations

import torch

from fairseq_moe_ext.byte_sizes import bytes_in_words
from fairseq_moe_ext.experts.formats import FLOAT
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS, load_kernel
from fairseq_moe_ext.kernels.crossing import most_rows
from fairseq_moe_ext.kernels.quantized_kernel import instructions_of


def warm_up() -> None:
    """Import the part of PyTorch that its attention comes to ask for at the first call (0.4 s)."""
    torch._check(True)


def kernel_in_words(layers: dict[str, MOELayer], int8_bytes: int = 0) -> str:
    """Which kernels compute these layers' experts, on which instructions, and how quantised ones lie: one line.

    int8_bytes: of dense layers in int8.
    """
    quantized = {layer.experts.format.name: layer for layer in layers.values() if layer.experts.format.name != FLOAT}
    total = sum(layer.experts.num_experts * layer.experts.expert_bytes for layer in layers.values())
    what = f"experts in {', '.join(quantized)} ({bytes_in_words(total)})" if quantized else "experts"
    if int8_bytes:
        what += f" and dense layers in int8 ({bytes_in_words(int8_bytes)})"
    return f"{what} are computed by " + "; ".join(dict.fromkeys(map(_describe, layers.values())))


def _describe(layer: MOELayer) -> str:
    experts, device = layer.experts, layer.gate.wg.weight.device
    dtype = experts.dtype
    where = f"{str(dtype).removeprefix('torch.')} on {device}"
    kernel = experts.kernel_for(device, dtype)
    if kernel == "quantized" and device.type == "cpu":
        ours = load_kernel()
        how = "PyTorch's products" if ours is None else f"the C kernel ({instructions_of(ours)})"
        return f"the kernel quantized, {how}, {where}"
    if kernel != "loop":
        return f"the kernel {kernel}, {where}"
    if device.type != "cpu":
        return f"one product per expert, {where} ({torch.cuda.get_device_name(device)})"
    most, products = most_rows(dtype, device), f"PyTorch's products ({torch.backends.cpu.get_cpu_capability()})"
    if not most:
        return f"{products}, {where}"
    ours = f"the C kernel ({load_kernel().name})"
    return f"{ours}, {where}" if most == ANY_ROWS else f"{ours} up to {most} rows of one, by {products} beyond, {where}"
