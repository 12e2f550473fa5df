"""A quantised checkpoint's file -> the state that any other checkpoint gives: each block under the originals' keys."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from fairseq_moe_ext.checkpoints.checkpoint_file import FileContent
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.plain_config import ConfigError, plain
from fairseq_moe_ext.checkpoints.quantized_about import INT8_SUFFIX, QuantizedAbout
from fairseq_moe_ext.checkpoints.quantized_file import SUFFIX, QuantizedFile
from fairseq_moe_ext.experts.block_part import BlockPart, parts_of
from fairseq_moe_ext.experts.formats import QUANTIZED
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.kernels.block import Block, Blocks, LinearBlock

_EXPERT = re.compile(rf"(.*\.experts\.)(\d+)\.({'|'.join(QUANTIZED)})")


def is_quantized(path: str | Path) -> bool:
    """Whether a checkpoint's file is one, by its name alone."""
    return Path(path).suffix == SUFFIX


def read_quantized(path: Path, loading: Loading) -> tuple[FileContent, QuantizedAbout]:
    """The state, whose tensors are read where they are used, and what the file says of itself.

    CheckpointError as `QuantizedFile`, and where a block is not of the size that its shape has.
    """
    file = QuantizedFile(path, loading)
    model: dict[str, Tensor] = {}
    for name, stored in file.tensors().items():
        model |= _tensors(path, name, stored, file.about)
    try:
        told = {name: plain(value) for name, value in file.about.state.items()}
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return FileContent({**told, "model": model}, had_optimizer=False), file.about


def _tensors(path: Path, name: str, stored: Tensor, about: QuantizedAbout) -> dict[str, Tensor]:
    """What one tensor of the file is in the state."""
    target = about.aliases.get(name, name)
    match = _EXPERT.fullmatch(name)
    if match:
        prefix, number, form = match.groups()
        dims = about.dims.get(_EXPERT.fullmatch(target)[1])
        layout = _layout(path, name, stored, Block, QUANTIZED[form], dims)
        keys = (f"{prefix}{number}.{key}" for key in EXPERT_KEYS.values())
        return dict(zip(keys, parts_of(layout, stored), strict=True))
    if name.endswith(INT8_SUFFIX):
        dims = about.dims.get(target.removesuffix(INT8_SUFFIX))
        layout = _layout(path, name, stored, LinearBlock, QUANTIZED["int8"], dims)
        return {name.removesuffix(INT8_SUFFIX): BlockPart(layout, stored, 0)}
    return {name: stored}


def _layout(path: Path, name: str, stored: Tensor, kind: type[Blocks], bits: int, dims: tuple | None) -> Blocks:
    if dims is None:
        raise CheckpointError(f"{path}: a block must have its shape in the metadata, {name} has none")
    try:
        found = kind(bits, *dims)
    except ValueError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error
    if tuple(stored.shape) != (found.nbytes,):
        raise CheckpointError(
            f"{path}: a block of shape {tuple(dims)} must have {found.nbytes} bytes, {name} has {stored.nbytes}"
        )
    return found
