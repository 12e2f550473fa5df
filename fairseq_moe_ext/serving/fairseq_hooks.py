"""The replacements inside fairseq: its two functions that find and read checkpoint files, and scoring under ranks.

They are installed by a task's `setup_task`, once, never at import.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.sequence_scorer import SequenceScorer

from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.find_files import find_checkpoint_files
from fairseq_moe_ext.serving.generator import count_results, take_turn
from fairseq_moe_ext.serving.safe_loader import SAFE_GLOBALS, revive
from fairseq_moe_ext.serving.served_state import served_state


class ServedPath(str):
    """A checkpoint path that is being loaded for serving, not for training to go on."""


def install() -> None:
    """Replace fairseq's checkpoint functions by ours; a second call changes nothing."""
    if hasattr(checkpoint_utils.load_checkpoint_to_cpu, "moe_ext_original"):
        return
    checkpoint_utils.load_checkpoint_to_cpu = _replacing(checkpoint_utils.load_checkpoint_to_cpu, _load)
    checkpoint_utils.get_maybe_sharded_checkpoint_filename = _replacing(
        checkpoint_utils.get_maybe_sharded_checkpoint_filename, _find
    )
    SequenceScorer.generate = _replacing(SequenceScorer.generate, _score)


def _replacing(original, replacement):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return replacement(original, *args, **kwargs)

    wrapper.moe_ext_original = original
    return wrapper


def _score(original, scorer, models, sample, **kwargs):
    """fairseq-eval-lm makes its scorer by itself."""
    hypotheses = take_turn(sample, lambda: original(scorer, models, sample, **kwargs))
    count_results(sample, hypotheses)
    return hypotheses


def _find(_original, filename: str, suffix: str, shard_idx: int, num_shards: int) -> str:
    """fairseq asks which file to load when it serves (never when training goes on)."""
    if os.pathsep in filename and not os.path.exists(filename):  # fairseq-generate has taken an ensemble apart
        raise CheckpointError(f"--path must name one checkpoint to this command, got {filename}")
    filename = filename.replace(".pt", suffix + ".pt")  # as fairseq reads --checkpoint-suffix
    if num_shards > 1:  # fairseq's own way past every check: it then loads with strict=False
        raise CheckpointError(
            f"--checkpoint-shard-count must be 1: the files of {filename} are found without it, got {num_shards}"
        )
    return ServedPath(find_checkpoint_files(filename).first)


def _load(original, path: str, arg_overrides: dict | None = None, load_on_all_ranks: bool = False) -> dict[str, Any]:
    if not isinstance(path, ServedPath):
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return revive(original(path, arg_overrides, load_on_all_ranks), lambda tensor: tensor)
    return served_state(path, arg_overrides)
