"""A quantised checkpoint's file, written piece by piece (partial_file.py).

Its layout is known before the first byte: blocks first, whose sizes are multiples of 64 bytes, then what has values of
4 bytes, of 2, of 1. Thus each tensor begins where its values may be mapped, and nothing lies between two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.partial_file import PartialFile, partial_files
from fairseq_moe_ext.checkpoints.quantization_source import SourceModel
from fairseq_moe_ext.checkpoints.quantized_about import FILE_PREFIX, METADATA_KEY, QuantizedAbout, QuantizedSource
from fairseq_moe_ext.checkpoints.quantized_layout import original_key, original_shapes
from fairseq_moe_ext.checkpoints.safetensors_file import read_safetensors
from fairseq_moe_ext.safetensors_header import DTYPES, TensorShape, header_bytes, layout

_LARGEST = 10**18  # bytes of a source's file: its number takes as much room as any
_DIGEST = "0" * 64


class QuantizedWriter(PartialFile):
    """Writes `tensors` and `files` into `target`, X.safetensors; as PartialFile.

    about: its source's fingerprint and the files' bytes are known at the end only, their names now. files: text files'
    names and content. force: what an earlier run has left of another fingerprint is lost; else CheckpointError.
    """

    def __init__(
        self,
        target: Path,
        tensors: Iterable[TensorShape],
        files: Mapping[str, bytes],
        about: QuantizedAbout,
        fingerprint: str,
        force: bool = False,
    ):
        super().__init__(target, fingerprint)
        self._about, self._force = about, force
        self._tensors = sorted(tensors, key=_order)
        self._tensors += [(FILE_PREFIX + name, torch.uint8, (len(content),)) for name, content in files.items()]
        names = tuple((name, _LARGEST) for name, _ in about.source.files)
        widest = replace(about, source=replace(about.source, fingerprint=_DIGEST, files=names))
        self._room = len(self._header(widest))
        self.open()
        for name, content in files.items():
            self.write(FILE_PREFIX + name, [torch.frombuffer(bytearray(content), dtype=torch.uint8)])

    def set_source(self, source: QuantizedSource) -> None:
        """What the file was made of, before it is completed: the same files."""
        self._about = replace(self._about, source=source)

    def _header(self, about: QuantizedAbout, checksums: Mapping[str, int] | None = None, room: int = 0) -> bytes:
        head = layout(self._tensors, {"format": "pt", METADATA_KEY: about.as_json()})
        known = checksums or {}
        return header_bytes(head, [known.get(name, 0) for name, _, _ in self._tensors], room)

    def _begin(self) -> None:
        size = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self._tensors)
        self._reserve(self._header(self._about, room=self._room), size)

    def _refuse_other(self) -> None:
        if not self._force:
            raise of_another(self.target)

    def _find_places(self) -> dict[str, tuple[int, int]]:
        found = read_safetensors(self._partial, DTYPES).tensors
        return {name: (each.offset, each.nbytes) for name, each in found.items()}

    def _seal(self, checksums: Mapping[str, int]) -> None:
        self._file.seek(0)
        self._file.write(self._header(self._about, checksums, self._room))
        self._file.flush()


def _order(tensor: TensorShape) -> tuple[int, int]:
    _, dtype, shape = tensor
    is_block = dtype == torch.uint8 and len(shape) == 1
    return (0 if is_block else 1), -dtype.itemsize


def begun_model(target: Path, experts: str, dense: str) -> SourceModel | None:
    """What an earlier run's unfinished file says of its source, None where there is no such file.

    CheckpointError where it was begun with other options.
    """
    partial, journal = partial_files(target)
    if not partial.is_file() or not journal.is_file():
        return None
    found = read_safetensors(partial, DTYPES)
    try:
        about = QuantizedAbout.from_metadata(found.metadata)
    except ValueError as error:
        raise CheckpointError(f"{partial}: {error}") from error
    if (about.experts, about.dense) != (experts, dense):
        raise of_another(target)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, bytes] = {}
    for name, tensor in found.tensors.items():
        if name.startswith(FILE_PREFIX):
            files[name.removeprefix(FILE_PREFIX)] = tensor.read().numpy().tobytes()
        else:
            shapes |= original_shapes(name, tensor.shape, about.dims)
    aliases = {original_key(alias): original_key(name) for alias, name in about.aliases.items()}
    names = tuple(name for name, _ in about.source.files)
    return SourceModel(shapes, aliases, about.state, files, about.source.licence, names, kept=about.kept)


def of_another(target: Path) -> CheckpointError:
    """What is said where an unfinished file cannot be gone on with."""
    return CheckpointError(
        f"{target}: what an earlier run has begun is of another source or of other options: "
        f"{partial_files(target)[0].name} must be gone, or --force begins anew"
    )
