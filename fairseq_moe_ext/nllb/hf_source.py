"""A folder in Hugging Face's layout as what a model is quantised from, shard by shard.

What the model is, config.json says, and which tensor lies in which shard the index; no shard need be there for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

from fairseq_moe_ext.bounded_json import read_regular
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.plain_json import json_state
from fairseq_moe_ext.checkpoints.quantization_source import PartContent, Source, SourceModel, SourcePart, SourceTensor
from fairseq_moe_ext.nllb.hf_folder import HfFolder
from fairseq_moe_ext.nllb.hf_model import (
    CONSTANTS,
    check_gating,
    check_tensor,
    keys_of,
    match_keys,
    read_config,
    read_model,
)
from fairseq_moe_ext.nllb.hf_tokenizer import SPM
from fairseq_moe_ext.nllb.names import COMPUTED, named_tensors

_MOST_TENSORS = 1_000_000  # where no index says how many there are
_LONGEST_LICENCE = 200


class HfSource(Source):
    """path: the folder. dictionary: the training's dict.txt; None: the order of the SentencePiece model. pieces: the
    SentencePiece model; None: the folder's, where it has one."""

    def __init__(self, path: str, dictionary: str | None = None, pieces: bytes | None = None):
        self.path = path
        self._dictionary, self._pieces = dictionary, pieces
        self._folder = HfFolder(Path(path), complete=False)
        if "quantization_config" in self._folder.config:
            raise CheckpointError(f"{path}: it is quantised already: config.json has a quantization_config")
        config = read_config(self._folder, len(self._folder.index) or _MOST_TENSORS)
        named = list(islice(named_tensors(config), _MOST_TENSORS))
        if self._folder.index:
            match_keys(named, self._folder.index, path)
        self._named = {key: tensor for tensor in named for key in keys_of(tensor)}
        check_gating(config, {_dtype(self._folder)}, path, "dtype")
        self._hf = read_model(self._folder, config, dictionary)

    def model(self) -> SourceModel:
        """As `Source` has it."""
        shapes: dict[str, tuple[int, ...]] = {}
        aliases: dict[str, str] = {}
        for tensor in dict.fromkeys(self._named.values()):
            first, *others = tensor.fairseq
            shapes[first] = tensor.shape
            aliases |= dict.fromkeys(others, first)
        shapes |= {key: tuple(values.shape) for key, values in CONSTANTS.items()}
        return SourceModel(
            shapes, aliases, json_state(self._hf.state), self._files(), licence(Path(self.path)),
            tuple(shard.name for shard in self._folder.shards), CONSTANTS,
        )  # fmt: skip

    def waits_for(self) -> str:
        """Nothing: `model` always says it."""
        raise AssertionError

    def parts(self, names: Sequence[str]) -> list[SourcePart]:
        """As `Source` has it: each shard by itself."""
        return [SourcePart((self._folder.path / name,)) for name in names]

    def content(self, part: SourcePart) -> PartContent:
        """As `Source` has it."""
        (shard,) = part.files
        tensors = []
        for key, tensor in self._folder.read(shard).items():
            if key in COMPUTED:
                continue
            if key not in self._named:
                raise CheckpointError(f"{shard}: it has tensors that are not NLLB's, the first is {key[:200]}")
            named = self._named[key]
            check_tensor(key, named, shard, tensor.dtype, tuple(tensor.shape))
            order = self._hf.order if named.rows else None
            tensors.append(SourceTensor(named.fairseq[0], key, tensor, order))
        there = {tensor.name for tensor in tensors}
        for key, file in self._folder.index.items():
            if file == shard.name and key not in there and key not in COMPUTED:
                raise CheckpointError(f"{shard}: the index says that it holds {key[:200]}")
        return PartContent(tensors)

    def _files(self) -> Mapping[str, bytes]:
        files = {name: text.encode() for name, text in self._hf.vocabulary.texts().items()}
        pieces = self._pieces
        if pieces is None and (self._folder.path / SPM).is_file():
            pieces = read_regular(self._folder.path / SPM)
        return files if pieces is None else {**files, SPM: pieces}


def _dtype(folder: HfFolder) -> torch.dtype:
    """Of the weights, as config.json says it: under its new name or its old one."""
    name = folder.config.get("dtype") or folder.config.get("torch_dtype")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else torch.float32


def licence(folder: Path) -> str | None:
    """As the front matter of the folder's README.md says it, `license: cc-by-nc-4.0`; None where it does not."""
    try:
        lines = read_regular(folder / "README.md").decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        name, _, value = line.partition(":")
        if name == "license" and value.strip():
            return value.strip().strip("\"'")[:_LONGEST_LICENCE]
    return None
