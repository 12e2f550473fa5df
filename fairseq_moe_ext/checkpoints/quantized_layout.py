"""Which tensors a quantised checkpoint has, and of which tensors of the source each is made.

Legend: D = model dim, F = hidden dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.quantized_about import INT8_SUFFIX
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY, is_dense_matrix
from fairseq_moe_ext.experts.formats import QUANTIZED
from fairseq_moe_ext.experts.parts import EXPERT_KEYS, packed_shapes
from fairseq_moe_ext.kernels.block import Block, Blocks, LinearBlock

_EXPERT_NAME = re.compile(rf"(.*\.experts\.)(\d+)\.(?:{'|'.join(QUANTIZED)})")
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class QuantizedTensor:
    """name, dtype, shape: in the file. keys: of the source's tensors that it is made of; an expert's in the order of
    EXPERT_KEYS. block: of an expert, or of an int8 matrix, whose bias is a tensor of its own and zero in the block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    block: Blocks | None = None

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_expert(self) -> bool:
        """Whether it is one."""
        return isinstance(self.block, Block)


@dataclass(frozen=True)
class QuantizedLayout:
    """tensors: by their names. aliases: further name -> name, of tensors whose keys have the same values."""

    tensors: dict[str, QuantizedTensor]
    aliases: dict[str, str]

    @property
    def dims(self) -> dict[str, tuple[int, int]]:
        """As of QuantizedAbout."""
        found = {}
        for tensor in self.tensors.values():
            if isinstance(tensor.block, Block):
                layer = EXPERT_KEY.match(tensor.keys[0]).group(1)
                found[layer] = tensor.block.model_dim, tensor.block.hidden_dim
            elif isinstance(tensor.block, LinearBlock):
                found[tensor.keys[0]] = tensor.block.outputs, tensor.block.inputs
        return found

    def by_key(self) -> dict[str, QuantizedTensor]:
        """The source's key -> what it becomes a part of."""
        return {key: tensor for tensor in self.tensors.values() for key in tensor.keys}


def quantized_layout(
    shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str], experts: str, dense: str
) -> QuantizedLayout:
    """shapes, aliases: as of SourceModel. experts: one of QUANTIZED; dense: one of DENSE.

    CheckpointError, which names no file, where an expert lacks a part or has parts of other shapes.
    """
    found: dict[str, QuantizedTensor] = {}
    parts: dict[tuple[str, str], dict[str, str]] = {}  # (layer, expert) -> part -> key
    for key, shape in shapes.items():
        match = EXPERT_KEY.match(key)
        if match:
            parts.setdefault((match.group(1), match.group(2)), {})[match.group(3).lstrip(".")] = key
            continue
        tensor = _dense(key, shape, dense)
        found[tensor.name] = tensor
    for (layer, number), keys in parts.items():
        tensor = _expert(f"{layer}{number}", keys, shapes, experts)
        found[tensor.name] = tensor
    name_of = {key: tensor.name for tensor in found.values() for key in tensor.keys}
    further = {}
    for alias, key in aliases.items():
        name = name_of[key]
        further[_dense(alias, shapes[key], dense).name] = name
    return QuantizedLayout(found, further)


def original_key(name: str) -> str:
    """Of a dense tensor's name in the file."""
    return name.removesuffix(INT8_SUFFIX)


def original_shapes(
    name: str, shape: tuple[int, ...], dims: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """The source's keys and shapes of what is called `name` in a file with these dims."""
    match = _EXPERT_NAME.fullmatch(name)
    if match is None:
        return {original_key(name): dims[original_key(name)] if name.endswith(INT8_SUFFIX) else shape}
    layer, number = match.groups()
    parts = packed_shapes(1, *dims[layer])
    return {f"{layer}{number}.{key}": parts[part][1:] for part, key in EXPERT_KEYS.items()}


def _dense(key: str, shape: tuple[int, ...], dense: str) -> QuantizedTensor:
    if not is_dense_matrix(key, shape):
        return QuantizedTensor(key, torch.float32, shape, (key,))
    if dense in _DTYPES:
        return QuantizedTensor(key, _DTYPES[dense], shape, (key,))
    block = LinearBlock(QUANTIZED[dense], *shape)
    return QuantizedTensor(key + INT8_SUFFIX, torch.uint8, (block.nbytes,), (key,), block)


def _expert(name: str, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], experts: str) -> QuantizedTensor:
    wanted = list(EXPERT_KEYS.values())
    if set(keys) != set(wanted):
        raise CheckpointError(f"{name} must have {', '.join(wanted)}, got {', '.join(sorted(keys))}")
    shape = shapes[keys[wanted[0]]]
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"{keys[wanted[0]]} must have 2 dims, got {shape}")
    hidden_dim, model_dim = shape
    of_dims = ((hidden_dim, model_dim), (hidden_dim,), (model_dim, hidden_dim), (model_dim,))
    for part, shape in zip(wanted, of_dims, strict=True):
        if shapes[keys[part]] != shape:
            raise CheckpointError(f"{keys[part]} must be {shape}, got {shapes[keys[part]]}")
    block = Block(QUANTIZED[experts], model_dim, hidden_dim)
    ordered = tuple(keys[part] for part in wanted)
    return QuantizedTensor(f"{name}.{experts}", torch.uint8, (block.nbytes,), ordered, block)
