"""NLLB from Hugging Face's layout to one checkpoint that fairseq serves, shard by shard.

No more than one shard lies in memory. What is written is read at its records' offsets, so it is a disk store as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fairseq_moe_ext.atomic_file import write_text
from fairseq_moe_ext.checkpoints.conversion_lock import only_writer
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.record_writer import RecordWriter
from fairseq_moe_ext.checkpoints.rounding import rows_in_dtype
from fairseq_moe_ext.checkpoints.state_keys import GATE_KEY
from fairseq_moe_ext.nllb.config import NllbConfig
from fairseq_moe_ext.nllb.hf_folder import HfFolder, values
from fairseq_moe_ext.nllb.hf_model import CONSTANTS, check_gating, match_tensors, read_config, read_model
from fairseq_moe_ext.nllb.hf_vocabulary import FairseqVocabulary
from fairseq_moe_ext.nllb.names import named_tensors


@dataclass(frozen=True)
class Converted:
    """files: checkpoint, dictionary, languages. task_flags: what the task needs for this vocabulary."""

    files: list[Path]
    config: NllbConfig
    task_flags: str


def convert_nllb(
    folder: str, target: str, dictionary: str | None = None, dtype: torch.dtype | None = None, force: bool = False
) -> Converted:
    """Write the model in `folder` as the checkpoint `target`, X.pt, with X.dict.txt and X.langs.txt beside it.

    dictionary: the training's dict.txt, whose order the embeddings' rows take; without it the SentencePiece model's
    order. dtype: of all weights; None: as they are. CheckpointError where the folder or the dictionary is wrong, where
    `target` exists and force is not given, or where it cannot be written. A broken-off run goes on where it was.
    """
    file = _target(target)
    with only_writer(file):
        if file.exists() and not force:
            raise CheckpointError(f"{file}: it exists already: give --force to overwrite it")
        return _convert(folder, file, dictionary, dtype)


def _convert(folder: str, file: Path, dictionary: str | None, dtype: torch.dtype | None) -> Converted:
    source = HfFolder(Path(folder))
    found = source.shapes()
    config = read_config(source, len(found))
    tensors = match_tensors(named_tensors(config), found, folder)
    model = read_model(source, config, dictionary)
    shapes: dict[tuple[str, ...], tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        shapes.setdefault(tensor.fairseq, (dtype or found[key][1], tensor.shape))
    gates = {dtype for names, (dtype, _) in shapes.items() if GATE_KEY.match(names[0])}
    check_gating(config, gates, folder, "--dtype")
    shapes |= {(name,): (values.dtype, tuple(values.shape)) for name, values in CONSTANTS.items()}
    writer = RecordWriter(file, model.state, shapes, _fingerprint(source, shapes, model.state))
    for name, constant in CONSTANTS.items():
        writer.write(name, [constant])
    total = sum(shard.stat().st_size for shard in source.shards)
    with tqdm(total=total, desc=f"converting {folder}", unit="B", unit_scale=True) as bar:
        for shard in source.shards:
            if not writer.is_done(shard.name):
                for key, tensor in source.read(shard).items():
                    if key in tensors:
                        named = tensors[key]
                        dtype_of, order = shapes[named.fairseq][0], model.order if named.rows else None
                        name = f"{shard.name}: {key}"
                        writer.write(named.fairseq[0], rows_in_dtype(values(tensor), dtype_of, order, name, "--dtype"))
                writer.finish(shard.name)
            bar.update(shard.stat().st_size)
    files = [file, *_write_vocabulary(file, model.vocabulary)]
    writer.complete()
    return Converted(files, config, model.vocabulary.task_flags)


def _target(target: str) -> Path:
    file = Path(target)
    if file.suffix != ".pt" or not file.parent.is_dir():
        raise CheckpointError(f"{target}: the new checkpoint must be named X.pt in an existing folder")
    return file


def _fingerprint(source: HfFolder, shapes: Mapping, state: dict[str, Any]) -> str:
    files = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in source.shards]
    content = repr((files, sorted(source.config.items()), list(shapes.items()), state))
    return hashlib.sha256(content.encode()).hexdigest()


def _write_vocabulary(file: Path, vocabulary: FairseqVocabulary) -> Sequence[Path]:
    files = []
    for name, text in vocabulary.texts().items():
        files.append(file.with_name(f"{file.stem}.{name}"))
        write_text(files[-1], text)
    return files
