"""The tensors of a model whose values lie quantised in a block of bytes, of the shapes that the model knows.

A quantised checkpoint has an expert as one block and a dense matrix as another; its state dict has for each of them
the original's keys, so that whatever asks for names and shapes finds them. Who takes blocks takes the block as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fairseq_moe_ext.kernels.block import Blocks

# what is answered without reading
_WITHOUT_VALUES = frozenset(
    {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.is_floating_point}
    | {Tensor.__len__, Tensor.__hash__, Tensor.is_contiguous}
)


class BlockPart(Tensor):
    """The weight or the bias of a layer in a block, float32; any use of its values reads and widens the block.

    layout: where the block's planes lie. stored: the block (nbytes,) uint8, which may lie in a file.
    """

    @staticmethod
    def __new__(cls, layout: Blocks, stored: Tensor, number: int):
        """number: among all layers' weights and biases, (0, 1) the first layer's."""
        outputs, inputs = layout.dims[number // 2]
        shape = (outputs,) if number % 2 else (outputs, inputs)
        part = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device="cpu")
        part.layout_of_block, part.stored, part._number = layout, stored, number
        return part

    @property
    def format_name(self) -> str:
        """int8 or int4."""
        return f"int{self.layout_of_block.bits}"

    @property
    def nbytes(self) -> int:
        """Of the whole block with its first part, so that a model's tensors together have what lies in the file."""
        return self.stored.nbytes if self._number == 0 else 0

    @property
    def place(self) -> tuple:
        """Equal for two that are the same part of the same block of the same file."""
        return self.stored.place, self._number

    @property
    def checksum(self) -> tuple | None:
        """Equal for the same parts of equal blocks."""
        return None if self.stored.checksum is None else (self.stored.checksum, self._number)

    def read(self) -> Tensor:
        """The values, as an ordinary tensor."""
        block = torch.empty(1, self.layout_of_block.nbytes, dtype=torch.uint8)
        block[0].copy_(self.stored)
        return self.layout_of_block.widen(block)[self._number][0].contiguous()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _WITHOUT_VALUES:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = _read_all(args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = _read_all(args, kwargs or {})
        return func(*args, **kwargs)


def _read_all(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return tree_map_only(BlockPart, BlockPart.read, (args, kwargs))


def parts_of(layout: Blocks, stored: Tensor, numbers: Iterable[int] = range(4)) -> list[BlockPart]:
    """The parts of one block; of an expert in the order of EXPERT_KEYS."""
    return [BlockPart(layout, stored, number) for number in numbers]


def block_of(parts: Sequence[Tensor], layout: Blocks) -> Tensor | None:
    """The block (nbytes,) uint8 that these parts make up; None where they are ordinary tensors.

    ValueError where they are of a block of another layout.
    """
    first = parts[0]
    if not isinstance(first, BlockPart):
        return None
    if first.layout_of_block != layout:
        raise ValueError(f"a block must be as {layout}, the checkpoint has one as {first.layout_of_block}")
    return first.stored
