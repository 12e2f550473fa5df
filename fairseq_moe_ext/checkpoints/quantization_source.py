"""What a model is quantised from: a checkpoint in any layout, its files one at a time, of which some may be missing.

A source says what the model is before its weights are there; then it gives the tensors of one part, a file or several
that only together hold tensors.
"""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.checkpoints.safetensors_file import FileTensor
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor


@dataclass(frozen=True)
class SourceModel:
    """What a file of the model needs before its first weight.

    shapes: of all tensors but aliases, by fairseq's keys. aliases: key -> the key whose values it has. state: the
    checkpoint but for its model, as plain JSON. files: text files, dictionaries and the like, by name. names: of the
    source's files, in the order in which they are read. constants: tensors that stand in none of them. kept: where the
    rest of the experts is left out; the parts have them, by the source's keys.
    """

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    state: dict[str, Any]
    files: Mapping[str, bytes]
    licence: str | None
    names: tuple[str, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    kept: KeptExperts | None = None


@dataclass(frozen=True)
class SourcePart:
    """Files that are read together, named after the first."""

    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Unique in a source."""
        return self.files[0].name

    @property
    def missing(self) -> list[Path]:
        """Those that are not there."""
        return [file for file in self.files if not file.is_file()]

    def stamps(self) -> list[list]:
        """Name, bytes and time of every file: other after a change. OSError where one is gone."""
        found = [(file.name, file.stat()) for file in self.files]
        return [[name, status.st_size, status.st_mtime_ns] for name, status in found]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a part, unread. key: fairseq's; name: as the file calls it, for messages. order: of its rows in the
    target, (V,) int64; None: as they are."""

    key: str
    name: str
    tensor: Tensor | FileTensor
    order: Tensor | None = None

    def read(self, room: Tensor | None = None) -> tuple[Tensor, str]:
        """The values, and a word that is equal for equal ones.

        room: (bytes,) uint8, where the values may lie if they fit; a system gives new memory more slowly than a disk
        fills it.
        """
        target = None
        if room is not None and self.tensor.nbytes <= len(room):
            target = room[: self.tensor.nbytes].view(self.tensor.dtype).view(self.tensor.shape)
        if isinstance(self.tensor, FileTensor):
            values, checksum = self.tensor.read_with_checksum(target)
        elif isinstance(self.tensor, StoredTensor):
            values, checksum = self.tensor.read() if target is None else target.copy_(self.tensor), self.tensor.checksum
        else:
            values, checksum = self.tensor, None
        if checksum is None:
            checksum = zlib.crc32(memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy()))
        return values, repr((self.name, str(values.dtype), tuple(values.shape), checksum))


@dataclass(frozen=True)
class PartContent:
    """tensors: unread. told: what the part says of the checkpoint that it belongs to, as plain JSON."""

    tensors: Sequence[SourceTensor]
    told: dict[str, Any] = field(default_factory=dict)


class Source(ABC):
    """path: as it was named."""

    path: str

    @abstractmethod
    def model(self) -> SourceModel | None:
        """None where the files that are there do not say it; CheckpointError where they are wrong."""

    @abstractmethod
    def waits_for(self) -> str:
        """What `model` lacks, for a message; CheckpointError where nothing of the source is there."""

    @abstractmethod
    def parts(self, names: Sequence[str]) -> list[SourcePart]:
        """The files of these names, in their order."""

    @abstractmethod
    def content(self, part: SourcePart) -> PartContent:
        """Of a part whose files are there; CheckpointError where they are wrong."""

    def check_told(self, told: Mapping[str, dict[str, Any]]) -> None:  # noqa: B027  not every layout says something
        """CheckpointError where parts, by name and in their order, are not of one checkpoint."""


def digest(words: Sequence[str]) -> str:
    """SHA-256 in hex of the words in any order."""
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()
