"""A quantised checkpoint: one safetensors file, whose tensors are read where they are used, each with its checksum."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.quantized_about import FILE_PREFIX, QuantizedAbout
from fairseq_moe_ext.checkpoints.records import Record, Records
from fairseq_moe_ext.checkpoints.safetensors_file import SafetensorsFile, read_safetensors
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor
from fairseq_moe_ext.safetensors_header import CHECKSUMS, DTYPES

SUFFIX = ".safetensors"
_HEX = frozenset("0123456789abcdef")


class QuantizedFile(Records):
    """The open file; about: what it says of itself.

    CheckpointError in one sentence where there is no such file, where it is cut off, of another version, or none.
    loading: of the whole checkpoint; hears of the bytes that are read.
    """

    def __init__(self, path: str | os.PathLike, loading: Loading | None = None):
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            super().__init__(path, loading or Loading(str(path)))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        found = read_safetensors(path, DTYPES)
        try:
            self.about = QuantizedAbout.from_metadata(found.metadata)
            checksums = _checksums(found)
            self._found = found.tensors
            self._records = {
                name: Record(name, each.offset, each.nbytes, crc)
                for (name, each), crc in zip(found.tensors.items(), checksums, strict=True)
            }
            _check_aliases(self.about.aliases, self._records)
        except ValueError as error:
            raise CheckpointError(f"{path}: {one_line(error)}") from error

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, unread; an alias has the same one as the name that it stands for."""
        own = {name: self._stored(name) for name in self._records if not name.startswith(FILE_PREFIX)}
        return own | {alias: own[name] for alias, name in self.about.aliases.items()}

    def files(self) -> dict[str, bytes]:
        """Name -> content of the text files and of the SentencePiece model; CheckpointError where one is damaged."""
        names = [name for name in self._records if name.startswith(FILE_PREFIX)]
        return {name.removeprefix(FILE_PREFIX): self._stored(name).read().numpy().tobytes() for name in names}

    def _stored(self, name: str) -> StoredTensor:
        # made anew for every caller: a tensor refers to the file, not the file to it, and so the last one closes it
        return StoredTensor.whole(self, self._records[name], self._found[name].dtype, self._found[name].shape)


def _checksums(found: SafetensorsFile) -> list[int]:
    """In the tensors' order; ValueError where they are not all there."""
    text = found.metadata.get(CHECKSUMS)
    words = text.split(" ") if isinstance(text, str) else []
    if len(words) != len(found.tensors) or not all(len(word) == 8 and _HEX.issuperset(word) for word in words):
        raise ValueError(f"{CHECKSUMS} of its metadata must be 8 hex digits for each of {len(found.tensors)} tensors")
    return [int(word, 16) for word in words]


def _check_aliases(aliases: dict[str, str], stored: Mapping[str, Record]) -> None:
    for alias, name in aliases.items():
        if alias in stored or name not in stored or name.startswith(FILE_PREFIX):
            raise ValueError(f"aliases must be further names of its tensors, got {alias:.80} for {name:.80}")
