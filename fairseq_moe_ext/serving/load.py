"""`fairseq_moe_ext.load`: a checkpoint -> a model that a Python program serves, without fairseq's commands."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import models as fairseqs_models
from fairseq import tasks as fairseqs_tasks
from fairseq import utils

from fairseq_moe_ext.serving.checkpoint_task import SERVED, CheckpointTask, is_multilingual
from fairseq_moe_ext.serving.keyword_options import (
    TASKS,
    KeywordOptions,
    OptionError,
    configuration,
    task_configuration,
)
from fairseq_moe_ext.serving.library_observer import LibraryObserver
from fairseq_moe_ext.serving.ranks import world_size
from fairseq_moe_ext.serving.served import Served, ServedParts
from fairseq_moe_ext.serving.served_state import served_state
from fairseq_moe_ext.serving.text import TextCodec

_PACKAGE = Path(__file__).resolve().parents[1]


def load(
    path: str | os.PathLike | Sequence[str | os.PathLike], data: str | os.PathLike | None = None, **options: Any
) -> Served:
    """The model of the checkpoint at `path`, ready to serve.

    path: as `--path` takes it: a merged file, or upstream's rank files by the name that they share; several make an
    ensemble. data: the folder with the dictionaries; None: the checkpoint's own folder. options: the options of
    fairseq's commands and of this plugin by name, `expert_buffer_size="20G"` for `--expert-buffer-size 20G`; what the
    checkpoint says of its task (languages, language tokens) need not be said again.

    OptionError where an option is unknown, has no effect here or is not what it must be; CheckpointError where a file
    cannot be served; ValueError where a flag does not fit the model. All are of one sentence.
    """
    if world_size() > 1:
        raise ValueError(f"load() must be called in one process, got {world_size()} ranks of torchrun")
    register()
    paths = _paths(path)
    overrides = _overrides(options)
    state = served_state(paths[0], overrides)
    options = {**_of_checkpoint(state), **options}
    keywords = KeywordOptions(_task_of(state))
    folder = os.fspath(Path(paths[0]).parent if data is None else data)
    args = keywords.parse(folder, options)
    cfg = configuration(args)
    task = fairseqs_tasks.setup_task(task_configuration(args))
    observer = LibraryObserver(str(args.moe_gating), args.moe_report, args.moe_trace)
    task.observer = observer
    models = [_model(task, state, cfg)]
    models += [_model(task, served_state(each, overrides), cfg) for each in paths[1:]]
    codec = TextCodec(task, args)
    return Served(ServedParts(paths, models, task, observer, codec, keywords, folder, options))


def register() -> None:
    """Make this plugin's tasks and models known to fairseq, as `--user-dir` does; a second call changes nothing."""
    fairseqs_tasks.import_tasks(str(_PACKAGE / "tasks"), "fairseq_moe_ext.tasks")
    fairseqs_models.import_models(str(_PACKAGE / "models"), "fairseq_moe_ext.models")


def _paths(path: Any) -> list[str]:
    if isinstance(path, str | os.PathLike):
        text = os.fspath(path)
        return [text] if os.path.exists(text) else utils.split_paths(text)
    return [os.fspath(each) for each in path]


def _overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    overrides = options.get("model_overrides") or {}
    if isinstance(overrides, str):
        try:
            overrides = ast.literal_eval(overrides)
        except (ValueError, SyntaxError):
            pass
    if not isinstance(overrides, Mapping):
        raise OptionError(f"model_overrides must be a mapping of the checkpoint's fields, got {overrides!r}")
    return dict(overrides)


def _task_of(state: Mapping[str, Any]) -> str:
    if not any(key.startswith("encoder.") for key in state["model"]):
        return "moe_language_modeling"
    served: CheckpointTask = state["task_state"][SERVED]
    return "moe_translation_multi_simple_epoch" if is_multilingual(served.fields) else "moe_translation"


def _of_checkpoint(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint says of its task's options; paths in it stay where they are."""
    served: CheckpointTask = state["task_state"][SERVED]
    known = set(TASKS[_task_of(state)]) - {"lang_dict"}
    if is_multilingual(served.fields):
        known -= {"source_lang", "target_lang"}
    return {name: value for name, value in served.fields.items() if name in known and value not in (None, "", [])}


def _model(task: Any, state: dict[str, Any], cfg: Any) -> torch.nn.Module:
    """As fairseq's `load_model_ensemble` and its commands make it."""
    model_cfg = state["cfg"].model
    task.load_state_dict(state["task_state"])
    model = task.build_model(model_cfg, from_checkpoint=True)
    model.set_num_updates(state["optimizer_history"][-1]["num_updates"])
    model.load_state_dict(state["model"], strict=True, model_cfg=model_cfg)
    if cfg.common.fp16:
        model.half()
    if torch.cuda.is_available() and not cfg.common.cpu:
        model.cuda()
    model.prepare_for_inference_(cfg)
    return model
