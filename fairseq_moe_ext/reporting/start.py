"""What happens once before the first pass of a served model, so that it is no part of a pass's time."""

from __future__ import annotations

import torch
from torch import nn

from fairseq_moe_ext.experts.device_experts import best_kernel, hardware_of
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.kernels.grouped_linear import ANY_ROWS, instructions_of_kernel, most_rows


def warm_up() -> None:
    """Import the part of PyTorch that its attention comes to ask for at the first call (0.4 s)."""
    torch._check(True)


def kernel_in_words(layers: dict[str, MOELayer]) -> str:
    """Which kernels compute these layers' experts, on which instructions: one line."""
    return "experts are computed by " + "; ".join(dict.fromkeys(map(_describe, layers.values())))


def _describe(layer: MOELayer) -> str:
    experts, weight = layer.experts, layer.gate.wg.weight
    device = weight.device
    dtype = experts.fc1_weight.dtype if isinstance(experts, ResidentExperts) else weight.dtype
    where = f"{str(dtype).removeprefix('torch.')} on {device}"
    kernel = _kernel(layer, device, dtype)
    if kernel != "loop":
        return f"the kernel {kernel}, {where}"
    if device.type != "cpu":
        return f"one product per expert, {where} ({torch.cuda.get_device_name(device)})"
    most, products = most_rows(dtype, device), f"PyTorch's products ({torch.backends.cpu.get_cpu_capability()})"
    if not most:
        return f"{products}, {where}"
    ours = f"the C kernel ({instructions_of_kernel()})"
    return f"{ours}, {where}" if most == ANY_ROWS else f"{ours} up to {most} rows of one, by {products} beyond, {where}"


def _kernel(layer: MOELayer, device: torch.device, dtype: torch.dtype) -> str:
    experts: nn.Module = layer.experts
    if layer.gating != "dynamic" or layer.exchange is not None or not isinstance(experts, ResidentExperts):
        return "loop"
    if experts.kernel != "auto":
        return experts.kernel
    return "loop" if experts.retain_dropout else best_kernel(hardware_of(device), dtype, experts.fc1_weight.shape[1:])
