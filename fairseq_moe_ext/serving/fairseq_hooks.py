"""The replacements inside fairseq: its functions that find, read and load checkpoints, and scoring under ranks.

They are installed when fairseq imports tasks/ (`--user-dir`), once, so that the first load in a process goes the way of
the second; importing the package itself installs nothing. What is not this plugin's goes to fairseq as it came.
"""

from __future__ import annotations

import functools
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fairseq import checkpoint_utils
from fairseq.sequence_scorer import SequenceScorer

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.find_files import check_one_checkpoint, find_checkpoint_files
from fairseq_moe_ext.checkpoints.safe_loader import allowed, revive
from fairseq_moe_ext.decoding.generator import by_owner, count_results
from fairseq_moe_ext.reporting.own_command import fairseqs_command
from fairseq_moe_ext.serving.load_models import check_alone, load_models, overrides_of_command_line
from fairseq_moe_ext.serving.ours import is_ours, is_served_task
from fairseq_moe_ext.serving.served_state import served_state

# whether the models that fairseq is loading are this plugin's; None: nobody has said
_serves: ContextVar[bool | None] = ContextVar("moe_serves", default=None)
# of this plugin, whatever they do: while there is one, files in training are read by the plugin's list
_tasks: weakref.WeakSet = weakref.WeakSet()


class ServedPath(str):
    """A checkpoint path that is being loaded for serving, not for training to go on."""


def install() -> None:
    """Replace fairseq's functions by ours; a second call changes nothing."""
    if hasattr(checkpoint_utils.load_checkpoint_to_cpu, "moe_ext_original"):
        return
    for name, replacement in (
        ("load_model_ensemble_and_task", _load_models),
        ("get_maybe_sharded_checkpoint_filename", _find),
        ("load_checkpoint_to_cpu", _load),
    ):
        setattr(checkpoint_utils, name, _replacing(getattr(checkpoint_utils, name), replacement))
    SequenceScorer.generate = _replacing(SequenceScorer.generate, _score)


def remember(task: Any) -> None:
    """`task` is one of this plugin's, for as long as it lives."""
    _tasks.add(task)


@contextmanager
def serving(ours: bool = True) -> Iterator[None]:
    """In this context the checkpoints that fairseq looks for and reads are this plugin's, or are not."""
    token = _serves.set(ours)
    try:
        yield
    finally:
        _serves.reset(token)


def _replacing(original, replacement):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return replacement(original, *args, **kwargs)

    wrapper.moe_ext_original = original
    return wrapper


def _score(original, scorer, models, sample, **kwargs):
    """fairseq-eval-lm makes its scorer by itself."""
    hypotheses = by_owner(sample, lambda: original(scorer, models, sample, **kwargs))
    count_results(sample, hypotheses)
    return hypotheses


def _load_models(
    original, filenames, arg_overrides=None, task=None, strict=True, suffix="", num_shards=1, state=None
) -> tuple[list, Any, Any]:
    """A task of this plugin serves whatever it is given; without a task the checkpoints themselves say whose they are.

    fairseq sets a task up by what a training left in the checkpoint; here the task serves, under `arg_overrides`, which
    are also `from_pretrained`'s arguments.
    """
    rest = (strict, suffix, num_shards, state)
    if task is not None or state is not None:
        with serving(getattr(task, "serves_experts", False)):
            return original(filenames, arg_overrides, task, *rest)
    paths = [_with_suffix(name, suffix) for name in filenames]
    asked_for = fairseqs_command() == "validate" and is_served_task((arg_overrides or {}).get("task"))  # dense ones too
    if num_shards > 1 or not (asked_for or all(map(is_ours, paths))):
        with serving(False):
            return original(filenames, arg_overrides, task, *rest)
    # a command's ranks may load a second model (--lm-path), and fairseq-validate has no task before its model
    if fairseqs_command() != "validate" and not any(each.ranks is not None for each in _tasks):
        check_alone(paths[0])
    overrides = dict(arg_overrides or {})
    of_state = overrides_of_command_line(overrides) if "path" in overrides else overrides
    loaded = load_models(paths, overrides.get("data"), overrides, of_state, of_parser=True)
    cfg = loaded.configuration()
    for model in loaded.models:
        if hasattr(model, "served_by"):
            model.served_by = cfg
    return loaded.models, cfg, loaded.task


def _with_suffix(filename: str, suffix: str) -> str:
    """As fairseq reads --checkpoint-suffix."""
    return filename.replace(".pt", suffix + ".pt")


def _find(original, filename: str, suffix: str, shard_idx: int, num_shards: int) -> str:
    """fairseq asks which file to load when it serves (never when training goes on)."""
    path = _with_suffix(filename, suffix)
    serves = _serves.get()
    if serves is None:
        serves = num_shards == 1 and is_ours(path)
    if not serves:
        return original(filename, suffix, shard_idx, num_shards)
    check_one_checkpoint(filename)  # fairseq-generate has taken an ensemble apart
    if num_shards > 1:  # fairseq's own way past every check: it then loads with strict=False
        raise CheckpointError(
            f"--checkpoint-shard-count must be 1: the files of {path} are found without it, got {num_shards}"
        )
    return ServedPath(find_checkpoint_files(path).first)


def _load(original, path: str, arg_overrides: dict | None = None, load_on_all_ranks: bool = False) -> dict[str, Any]:
    if isinstance(path, ServedPath):
        return served_state(path, arg_overrides)

    def load() -> dict[str, Any]:
        return original(path, arg_overrides, load_on_all_ranks)

    if not _tasks:
        try:
            return load()
        except pickle.UnpicklingError:  # PyTorch's safe loader refuses what fairseq has written
            if not is_ours(path):
                raise
    with allowed(users_first=True):
        return revive(load(), lambda tensor: tensor)
