"""A model folder in Hugging Face's layout: its configuration, and its weights shard by shard.

The weights are `model.safetensors` or `pytorch_model.bin`, or several files with an index (`*.index.json`) that says
which tensor lies in which. Pickles are read by PyTorch's safe loader only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_ext import bounded_json
from fairseq_moe_ext.checkpoints.checkpoint_file import check_names, read_pickle
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.loading import Loading
from fairseq_moe_ext.checkpoints.safetensors_file import FileTensor, read_safetensors
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OTHER_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".gguf", ".ckpt", ".pt", ".pth", ".onnx")
_MOST_FIELDS = 10_000  # of a configuration, with all that is in them
_LFS_POINTER = b"version https://git-lfs"


class HfFolder:
    """config: config.json's content. shards: the weights' files, in the order of their names. index: which tensor lies
    in which; empty without one.

    complete: whether all shards must be there. CheckpointError where a file is missing, cut off, or no such file.
    """

    def __init__(self, path: Path, complete: bool = True):
        self.path = path
        self._complete = complete
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder in Hugging Face's layout")
        self.config = read_json(path / "config.json", _MOST_FIELDS)
        self.shards, self.index = self._find()

    def _find(self) -> tuple[list[Path], dict[str, str]]:
        for name in WEIGHTS:
            index, whole = self.path / f"{name}.index.json", self.path / name
            if index.is_file():
                weight_map = read_json(index).get("weight_map")
                if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                    raise CheckpointError(f"{index}: it must have a weight_map from tensors to files")
                files = sorted(set(weight_map.values()))
                wrong = [file for file in files if Path(file).name != file or not 0 < len(file) <= 200 or "\0" in file]
                if wrong:
                    raise CheckpointError(f"{index}: its files must lie beside it, got {wrong[0]!r:.80}")
                missing = [file for file in files if not (self.path / file).is_file()]
                if missing and self._complete:
                    shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
                    raise CheckpointError(
                        f"{self.path}: incomplete download: {index.name} names {len(files)} files, "
                        f"{len(missing)} are not there: {shown}"
                    )
                return [self.path / file for file in files], weight_map
            if whole.is_file():
                return [whole], {}
            shards = sorted(self.path.glob(f"{whole.stem}-?????-of-?????{whole.suffix}"))
            if shards:
                return self._without_index(shards, index.name), {}
        others = sorted(file.name for file in self.path.iterdir() if file.suffix in _OTHER_WEIGHTS)
        found = f"; what is there is of another kind or name: {', '.join(others[:3])}" if others else ""
        raise CheckpointError(f"{self.path}: no weights: neither {' nor '.join(WEIGHTS)}, whole or in parts{found}")

    def _without_index(self, shards: list[Path], index: str) -> list[Path]:
        """All parts of one model, by their names: what each holds is read off them."""
        stem, number = shards[0].stem.partition("-")[0], shards[0].stem.rpartition("-of-")[2]
        parts = int(number) if number.isdecimal() else 0
        names = [f"{stem}-{part:05d}-of-{number}{shards[0].suffix}" for part in range(1, parts + 1)]
        there = [shard.name for shard in shards]
        if not set(there) <= set(names) or self._complete and there != names:
            raise CheckpointError(
                f"{self.path}: incomplete download: {index} is not there, and the {len(shards)} parts beside it, from "
                f"{shards[0].name} to {shards[-1].name}, are not all of one model"
            )
        return [self.path / name for name in names]

    def shapes(self) -> dict[str, tuple[Path, torch.dtype, tuple[int, ...]]]:
        """Tensor -> (its shard, dtype, shape); reads no weights, but every file's head and length."""
        found: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        for shard in self.shards:
            for key, tensor in self.read(shard).items():
                found[key] = (shard, tensor.dtype, tuple(tensor.shape))
        absent = sorted(set(self.index) - set(found))
        if absent:
            file = self.path / self.index[absent[0]]
            raise CheckpointError(f"{file}: the index says that it holds {absent[0][:200]}")
        return found

    def read(self, shard: Path) -> Mapping[str, Tensor | FileTensor]:
        """One shard's tensors, most of them unread: `values` gives an ordinary tensor."""
        try:
            bounded_json.check_regular(shard)
            with open(shard, "rb") as file:
                head = file.read(len(_LFS_POINTER))
        except OSError as error:
            raise CheckpointError(f"{shard}: {error.strerror}") from error
        if head == _LFS_POINTER:
            raise CheckpointError(f"{shard}: incomplete download: a Git LFS pointer in place of the weights")
        found = read_safetensors(shard).tensors if shard.suffix == ".safetensors" else _read_bin(shard)
        for key in found if self.index else ():
            if self.index.get(key) != shard.name:
                known = self.index.get(key)
                raise CheckpointError(f"{shard}: the index must know its tensor {key[:200]}, got {known}")
        return found


def values(tensor: Tensor | FileTensor) -> Tensor:
    """The tensor, read where it was not."""
    return tensor.read() if isinstance(tensor, StoredTensor | FileTensor) else tensor


def _read_bin(shard: Path) -> dict[str, Tensor]:
    state, _ = read_pickle(shard, Loading(str(shard)))
    if not isinstance(state, dict):
        raise CheckpointError(f"{shard}: it must map names to tensors, got a {type(state).__name__}")
    check_names(shard, state)
    return state


def read_json(file: Path, most: int = bounded_json.MOST_VALUES) -> dict[str, Any]:
    """The object in `file`; CheckpointError where there is none of at most `most` values."""
    try:
        content = bounded_json.read_json(file, most)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: it must hold a JSON object, got {type(content).__name__}")
    return content
