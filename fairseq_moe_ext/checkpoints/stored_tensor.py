"""Tensors that stay in their checkpoint file until they are used, so that a state of any size costs no memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.record_file import RecordFile
from fairseq_moe_ext.checkpoints.records import Record, Records
from fairseq_moe_ext.torch_versions import storage_place

# what is answered without reading
_WITHOUT_VALUES = frozenset(
    {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "nbytes")}
    | {Tensor.requires_grad.__get__}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.is_floating_point}
    | {Tensor.__len__, Tensor.__hash__, Tensor.is_contiguous}
)


_MOST_DIMS = 8


def check_tensor(tensor: Tensor, what: str, room: int | None = None) -> None:
    """CheckpointError, beginning with `what`, unless the tensor is dense and lies within its storage.

    room: bytes of that; None: as it says itself.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{what}: tensors must be dense, found one that is {tensor.layout}")
    if tensor.dim() > _MOST_DIMS:
        raise CheckpointError(f"{what}: tensors must have at most {_MOST_DIMS} dims, found one of {tensor.dim()}")
    if tensor.numel() > 0:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps) + 1
        room = tensor.untyped_storage().nbytes() if room is None else room
        if end * tensor.element_size() > room:
            raise CheckpointError(
                f"{what}: a tensor must lie within its {room:,} bytes, got one of shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()} from value {tensor.storage_offset()} on"
            )


class StoredTensor(Tensor):
    """A tensor in a file of records: shape and dtype are known, any use of the values reads them, and keeps nothing.

    `parameter.copy_(stored)` reads straight into the parameter where dtype and layout are the same.
    """

    @staticmethod
    def __new__(cls, meta: Tensor, file: RecordFile):
        """meta: as `torch.load(map_location="meta")` gives it, its storage with the offset in the file."""
        offset, size = storage_place(meta)
        check_tensor(meta, str(file.path), size)
        if meta.numel() * meta.element_size() > size:
            raise CheckpointError(f"{file.path}: a tensor of shape {tuple(meta.shape)[:8]} must not repeat its values")
        record = None if meta.numel() == 0 else file.record_at(offset, size)
        return cls._of_record(file, record, meta, meta.storage_offset())

    @classmethod
    def whole(cls, file: Records, record: Record, dtype: torch.dtype, shape: Sequence[int]) -> StoredTensor:
        """All of a record of as many bytes."""
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return cls._of_record(file, record if meta.numel() else None, meta, 0)

    @classmethod
    def _of_record(cls, file: Records, record: Record | None, like: Tensor, start: int) -> StoredTensor:
        stored = Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device="cpu")
        stored._start, stored._file, stored._record = start, file, record
        return stored

    @property
    def place(self) -> tuple:
        """Equal for two tensors that are the same values in the same place of the same file."""
        offset = None if self._record is None else self._record.offset
        return self._file.path, offset, self._start, self.dtype, tuple(self.shape), self.stride()

    @property
    def checksum(self) -> tuple | None:
        """Equal for two tensors of equal values, wherever they lie; None where the file has no checksums."""
        if self._record is None or not self._file.has_checksums:
            return None
        return self._record.crc, self._start, self.dtype, tuple(self.shape), self.stride()

    def read(self) -> Tensor:
        """The values, as an ordinary tensor."""
        if self._record is None or self.is_contiguous():
            target = torch.empty(self.shape, dtype=self.dtype)
            self._fill(target)
            return target
        record: Record = self._record
        storage = torch.empty(record.size // self.element_size(), dtype=self.dtype)
        self._file.read_into(storage, self.dtype, record)
        return storage.as_strided(self.shape, self.stride(), self._start)

    def copy_to(self, target: Tensor) -> None:
        """`target.copy_(self)` with no copy in between where none is needed."""
        with torch.no_grad():
            if target.shape == self.shape and target.is_contiguous() and self.is_contiguous():
                self._fill(target)
            else:
                target.copy_(self.read())

    def _fill(self, target: Tensor) -> None:
        if self._record is not None:
            self._file.read_into(target, self.dtype, self._record, self._start * self.element_size())

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _WITHOUT_VALUES:
            return super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.copy_ and not isinstance(args[0], StoredTensor):
            args[1].copy_to(args[0])
            return args[0]
        args, kwargs = tree_map_only(StoredTensor, StoredTensor.read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(StoredTensor, StoredTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)
