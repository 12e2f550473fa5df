"""How an expert's weights lie in memory and in a store's file: as floats, or quantised.

Resident experts, slot pools, stores and files ask the Format; nobody else knows of how many tensors an expert is. Its
packed parts are those tensors of one expert; a pool has the same for S slots.

Legend: S = slots of a pool, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_ext.experts.block_part import block_of
from fairseq_moe_ext.experts.parts import EXPERT_KEYS, packed_shapes
from fairseq_moe_ext.experts.quantize import VERSION, QuantizedPart
from fairseq_moe_ext.kernels.block import GROUP, Block, QuantizedPool
from fairseq_moe_ext.kernels.choice import choose_kernel
from fairseq_moe_ext.kernels.grouped_mlp import Pool

FLOAT = "float"
QUANTIZED = {"int8": 8, "int4": 4}  # name -> bits
FORMATS = (FLOAT, *QUANTIZED)
DENSE = "int8"  # how dense layers are quantised, whatever the experts are
EXPERTS, ALL = SCOPES = ("experts", "all")  # of a model, what is quantised
QUANTIZED_KERNELS = {"auto": "quantized", "loop": "widened"}  # KERNELS -> grouped_mlp.py's names


@dataclass(frozen=True)
class Format(ABC):
    """Of one layer's experts."""

    model_dim: int
    hidden_dim: int

    @property
    @abstractmethod
    def name(self) -> str:
        """One of FORMATS."""

    @property
    @abstractmethod
    def keys(self) -> Sequence[str]:
        """What the packed parts are called in a store's file."""

    @property
    def version(self) -> str:
        """In a store's file: what else decides about the values beside the originals; "" for nothing."""
        return ""

    @abstractmethod
    def shapes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of a pool's tensors, in the order of the packed parts."""

    @abstractmethod
    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Of a pool's tensors in a model of that dtype."""

    def expert_bytes(self, model: torch.dtype) -> int:
        """Of one expert in a pool."""
        return sum(map(math.prod, self.shapes(1).values())) * self.dtype(model).itemsize

    @abstractmethod
    def pack(self, parts: Sequence[Tensor], name: str) -> list[Tensor]:
        """An expert's parts in the order of EXPERT_KEYS -> its packed parts, which get values where they are copied to.
        name: what stands before the parts' keys in the state dict, for errors."""

    @abstractmethod
    def originals(self, packed: Sequence[Tensor]) -> Sequence[Tensor]:
        """What `pack` was given."""

    @abstractmethod
    def unpack(self, packed: Sequence[Tensor]) -> Sequence[Tensor]:
        """An expert's values in a pool -> its parts for a state dict; RuntimeError where they are not to be saved."""

    @abstractmethod
    def pool(self, tensors: Sequence[Tensor]) -> Pool:
        """A pool's tensors as the kernels take them."""

    @abstractmethod
    def kernel(self, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
        """grouped_mlp.py's name of what computes rows of `dtype` on `device`, as `wanted` (KERNELS) says. ValueError
        where that cannot be."""


class Float(Format):
    """The parts as they are, in the model's dtype."""

    name = FLOAT
    keys = tuple(EXPERT_KEYS.values())

    def shapes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """As `Format` has it."""
        return packed_shapes(slots, self.model_dim, self.hidden_dim)

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """As `Format` has it."""
        return model

    def pack(self, parts: Sequence[Tensor], name: str) -> list[Tensor]:
        """As `Format` has it."""
        return list(parts)

    def originals(self, packed: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `Format` has it."""
        return packed

    def unpack(self, packed: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `Format` has it."""
        return packed

    def pool(self, tensors: Sequence[Tensor]) -> Pool:
        """As `Format` has it."""
        return list(tensors)

    def kernel(self, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
        """As `Format` has it."""
        return choose_kernel(wanted, device, dtype, (self.hidden_dim, self.model_dim))


@dataclass(frozen=True)
class Quantized(Format):
    """One block of bytes (kernels/block.py), the same in a model of any dtype."""

    bits: int

    @property
    def name(self) -> str:
        """As `Format` has it."""
        return f"int{self.bits}"

    @property
    def block(self) -> Block:
        """Where its planes lie."""
        return Block(self.bits, self.model_dim, self.hidden_dim)

    @property
    def keys(self) -> Sequence[str]:
        """As `Format` has it."""
        return (self.name,)

    @property
    def version(self) -> str:
        """As `Format` has it: the group's size and the quantiser's version."""
        return f"group {GROUP}, version {VERSION}"

    def shapes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """As `Format` has it."""
        return {"blocks": (slots, self.block.nbytes)}

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """As `Format` has it."""
        return torch.uint8

    def pack(self, parts: Sequence[Tensor], name: str) -> list[Tensor]:
        """As `Format` has it; a block as it is. Copying raises ValueError where a weight is a NaN or infinite."""
        found = block_of(parts, self.block)
        return [QuantizedPart(self.block, parts, name) if found is None else found]

    def originals(self, packed: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `Format` has it."""
        (part,) = packed
        return part.originals if isinstance(part, QuantizedPart) else packed

    def unpack(self, packed: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `Format` has it: never."""
        raise RuntimeError(
            f"experts in {self.name} are not saved as floats, which would be quantised twice: the checkpoint that they "
            "were loaded from has the originals"
        )

    def pool(self, tensors: Sequence[Tensor]) -> Pool:
        """As `Format` has it."""
        (blocks,) = tensors
        return QuantizedPool(self.block, blocks)

    def kernel(self, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
        """As `Format` has it."""
        if wanted not in QUANTIZED_KERNELS:
            raise ValueError(
                f"kernel must be one of {', '.join(QUANTIZED_KERNELS)} for experts in {self.name}, got {wanted}"
            )
        return QUANTIZED_KERNELS[wanted]


def format_named(name: str, model_dim: int, hidden_dim: int) -> Format:
    """name: one of FORMATS."""
    return Float(model_dim, hidden_dim) if name == FLOAT else Quantized(model_dim, hidden_dim, QUANTIZED[name])
