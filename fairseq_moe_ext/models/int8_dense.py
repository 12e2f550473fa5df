"""A served model's dense linear layers and embeddings in int8, quantised while they are loaded.

The same kernels as the experts' (kernels/quantized.py), each layer a block of its own. What is small or decides where
tokens go stays as it is: gates, norms, biases, positions.

Legend: M = output features, K = input features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fairseq_moe_ext.checkpoints.model_fits import WithoutNormalValues
from fairseq_moe_ext.experts.block_part import block_of
from fairseq_moe_ext.experts.gradients import without_gradients
from fairseq_moe_ext.experts.quantize import fill_bias, quantize_linear
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.cmr import CMRGate
from fairseq_moe_ext.kernels.autocast import autocast_dtype, no_autocast
from fairseq_moe_ext.kernels.block import LinearBlock, QuantizedPool
from fairseq_moe_ext.kernels.quantized_linear import look_up, multiply, multiply_widened

BITS = 8
REPLACED = (nn.Linear, nn.Embedding)
Model = TypeVar("Model", bound=nn.Module)


class Int8Weight(nn.Module):
    """A weight (M, K) and its bias as a block, which tied layers share; no part of a state dict."""

    def __init__(self, outputs: int, inputs: int, device: torch.device | None = None):
        super().__init__()
        self.block = LinearBlock(BITS, outputs, inputs)
        self._pool: QuantizedPool | None = None
        self.register_buffer("bytes", torch.empty(1, self.block.nbytes, dtype=torch.uint8, device=device), False)

    @property
    def pool(self) -> QuantizedPool:
        """As the kernels take it."""
        now = self.bytes
        if self._pool is None or self._pool.blocks is not now:  # the model went to another device
            self._pool = QuantizedPool(self.block, now)
        return self._pool

    def fill(self, weight: Tensor, bias: Tensor | None, prefix: str) -> None:
        """Quantise, or take a block as it is; ValueError naming the tensor where a value is a NaN or infinite."""
        filled = self.bytes if self.bytes.device.type == "cpu" else torch.empty_like(self.bytes, device="cpu")
        (layer,) = self.block.layers(filled.zero_())
        stored = block_of([weight], self.block)
        if stored is None:
            quantize_linear(layer, weight, bias, prefix)
        else:
            filled[0].copy_(stored)
            fill_bias(layer, bias, prefix + "bias")
        self.bytes.copy_(filled)


class _Int8(nn.Module):
    """Stands in for a module that has a weight (M, K), and a bias or none, under the same keys of the state dict."""

    def __init__(self, int8: Int8Weight, has_bias: bool):
        super().__init__()
        self.int8, self._has_bias = int8, has_bias
        self.requires_grad_(False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise RuntimeError(
            "linear layers in int8 are not saved as floats, which would be quantised twice: the checkpoint that they "
            "were loaded from has the originals"
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        block = self.int8.block
        shapes = {"weight": (block.outputs, block.inputs)} | ({"bias": (block.outputs,)} if self._has_bias else {})
        found = {name: state_dict.get(prefix + name) for name in shapes}
        missing = [prefix + name for name, tensor in found.items() if tensor is None]
        missing_keys += missing
        # strict or not: these have no values of their own
        misfits = [f"{key}: missing, and a layer in int8 has no values of its own" for key in missing]
        misfits += [
            f"{prefix}{name}: expected shape {shape}, got {tuple(found[name].shape)}"
            for name, shape in shapes.items()
            if found[name] is not None and found[name].shape != shape
        ]
        error_msgs += misfits
        if strict:
            known = {prefix + name for name in shapes}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        if not misfits:
            self.int8.fill(found["weight"], found.get("bias"), prefix)


class Int8Linear(_Int8):
    """In the place of a torch.nn.Linear. widens: whether the weight is widened for every call, and x taken as it is."""

    def __init__(self, int8: Int8Weight, has_bias: bool, widens: bool = False):
        super().__init__(int8, has_bias)
        self._multiply = multiply_widened if widens else multiply
        self.in_features, self.out_features = int8.block.inputs, int8.block.outputs

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., M) in its dtype, or autocast's; RuntimeError where gradients are asked for."""
        dtype = autocast_dtype(x)
        if dtype is None and not torch.is_grad_enabled():  # as served: what follows takes as long as a small product
            return self._multiply(x, self.int8.pool)
        x = x.to(dtype or x.dtype)
        with torch.no_grad(), no_autocast(x):
            outputs = self._multiply(x, self.int8.pool)
        return without_gradients("linear layers in int8", outputs, x)


class Int8Embedding(_Int8):
    """In the place of a torch.nn.Embedding."""

    def __init__(self, int8: Int8Weight, padding_idx: int | None):
        super().__init__(int8, has_bias=False)
        self.num_embeddings, self.embedding_dim, self.padding_idx = int8.block.outputs, int8.block.inputs, padding_idx
        # follows the model's dtype and device
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> (..., K) in the model's dtype."""
        return look_up(ids, self.int8.pool).to(self._like.dtype)


def built_in_int8(build: Callable[[], Model], widens: bool = False) -> Model:
    """`build`'s model after `put_in_int8`, of whose floats nothing that is replaced ever has memory."""
    with _without_memory() as without:
        model = build()
    put_in_int8(model, widens)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():  # what was not replaced, or is another module's, too
        for name, parameter in module._parameters.items():
            if parameter in without:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
                module._parameters[name] = made[parameter]
    return model


@contextmanager
def _without_memory() -> Iterator[set[nn.Parameter]]:
    """Linear layers and embeddings made in this context by this thread have no memory; gives their parameters."""
    without: set[nn.Parameter] = set()
    here = threading.get_ident()

    def take_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != here or type(module) not in REPLACED or parameter.is_meta:  # the last: tied
            return None
        without.add(found := nn.Parameter(torch.empty_like(parameter, device="meta")))
        return found  # the other one was never written to, so that no page of it is resident

    hook = register_module_parameter_registration_hook(take_memory)
    try:
        with WithoutNormalValues():
            yield without
    finally:
        hook.remove()


def put_in_int8(model: nn.Module, widens: bool = False) -> None:
    """Replace the dense linear layers and embeddings of a model that has no weights yet; tied ones stay tied.

    widens: as of Int8Linear.
    fairseq's attention hands its weights to a function of PyTorch's where it decodes nothing; from here on it calls its
    layers everywhere.
    """
    weights: dict[nn.Parameter, Int8Weight] = {}
    kept = [module for module in model.modules() if isinstance(module, CMRGate)]
    kept += [layer.gate for layer in model.modules() if isinstance(layer, MOELayer)]
    parts = {part for module in kept for part in module.modules()}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in REPLACED and child not in parts:
                module.register_module(name, _in_int8(child, weights, widens))
        if isinstance(module, MultiheadAttention):
            module.skip_embed_dim_check = True  # the one switch that it has for this


def _in_int8(
    module: nn.Linear | nn.Embedding, weights: dict[nn.Parameter, Int8Weight], widens: bool
) -> Int8Linear | Int8Embedding:
    weight = module.weight
    if weight not in weights:
        weights[weight] = Int8Weight(*weight.shape, device=None if weight.is_meta else weight.device)
    if isinstance(module, nn.Embedding):
        return Int8Embedding(weights[weight], module.padding_idx)
    return Int8Linear(weights[weight], module.bias is not None, widens)


def bytes_in_int8(model: nn.Module) -> int:
    """Of all blocks that `put_in_int8` made."""
    return sum(module.bytes.nbytes for module in model.modules() if isinstance(module, Int8Weight))
