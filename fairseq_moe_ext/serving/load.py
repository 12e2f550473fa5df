"""`fairseq_moe_ext.load`: a checkpoint -> a model that a Python program serves, without fairseq's commands."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import models as fairseqs_models
from fairseq import tasks as fairseqs_tasks
from fairseq import utils
from omegaconf import DictConfig

from fairseq_moe_ext.checkpoints.errors import one_line
from fairseq_moe_ext.ranks.program import OneProcess, ProgramRanks, ranks_of_program
from fairseq_moe_ext.ranks.workers import StartedRanks
from fairseq_moe_ext.reporting.program_observer import ProgramObserver
from fairseq_moe_ext.serving.keyword_options import OptionError, configuration
from fairseq_moe_ext.serving.load_models import LoadedModels, load_models
from fairseq_moe_ext.serving.model_overrides import read_overrides
from fairseq_moe_ext.serving.served import Served, ServedParts
from fairseq_moe_ext.serving.text import TextCodec

_PACKAGE = Path(__file__).resolve().parents[1]


def load(
    path: str | os.PathLike | Sequence[str | os.PathLike], data: str | os.PathLike | None = None, **options: Any
) -> Served:
    """The model of the checkpoint at `path`, ready to serve.

    path: as `--path` takes it: a merged file, upstream's rank files by the name that they share, or a quantised
    checkpoint; several make an ensemble. data: the folder with the dictionaries; None: the checkpoint's own folder, of
    a quantised one the dictionaries, languages and SentencePiece model in its file, by which texts are raw. options:
    the options of fairseq's commands and of this plugin by name, `expert_buffer_size="20G"` for `--expert-buffer-size
    20G`; what the checkpoint says of its task (languages, language tokens) need not be said again. Of a
    multilingual model that has its dictionaries in its file, the languages may be left to the calls.

    Among several ranks, those of torchrun or of the program's own torch.distributed, all of them call this with the
    same arguments and then make the same calls; each holds its share of the experts. A process that is alone starts the
    other ranks itself under `distributed_world_size`, and forwards its calls to them.

    OptionError where an option is unknown, has no effect here or is not what it must be; CheckpointError where a file
    cannot be served; ValueError where a flag does not fit the model; ExchangeError where another rank failed. All are
    of one sentence.
    """
    register()
    count = options.pop("distributed_world_size", None)
    return served_by(_ranks(count, {"path": path, "data": data, **options}), path, data, **options)


def served_by(
    ranks: ProgramRanks | OneProcess, path: Any, data: str | os.PathLike | None = None, **options: Any
) -> Served:
    """What `load` gives, where it is known which ranks serve."""
    register()
    try:
        with ranks.call("load", {"path": path, "data": data, **options}) as call:
            with call.preparing():
                paths = _paths(path)
            with call.preparing():
                return Served(_parts(paths, data, options, ranks))
    except BaseException:
        ranks.end()
        raise


def _ranks(count: Any, told: Mapping[str, Any]) -> ProgramRanks | OneProcess:
    """Those that are there, or `count` ranks, of which this process starts all but itself."""
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise OptionError(f"distributed_world_size must be a number of ranks, got {count!r}")
    cpu = bool(told.get("cpu"))
    ranks = ranks_of_program(cpu)
    if count is None or count == ranks.world_size:
        return ranks
    if ranks.world_size > 1:
        ranks.end()
        raise OptionError(f"distributed_world_size must be the number of the ranks, {ranks.world_size}, got {count}")
    return StartedRanks(count, cpu, told)


def register() -> None:
    """Make this plugin's tasks and models known to fairseq, as `--user-dir` does; a second call changes nothing."""
    fairseqs_tasks.import_tasks(str(_PACKAGE / "tasks"), "fairseq_moe_ext.tasks")
    fairseqs_models.import_models(str(_PACKAGE / "models"), "fairseq_moe_ext.models")


def _parts(
    paths: list[str], data: str | os.PathLike | None, options: Mapping[str, Any], ranks: ProgramRanks | OneProcess
) -> ServedParts:
    loaded = load_models(paths, data, options, _overrides(options), ProgramObserver, ranks=ranks.members)
    if options.get("tokens_per_sample") is not None and loaded.args.moe_gating != "static":
        raise OptionError(
            "tokens_per_sample must go with moe_gating='static', under which a text is padded to it, got "
            f"{options['tokens_per_sample']} with {loaded.args.moe_gating}"
        )
    cfg = configuration(loaded.args)
    for model in loaded.models:
        _put_into_service(model, cfg)
    codec = _codec(loaded)
    task, keywords = loaded.task, loaded.keywords
    told = keywords, loaded.data, loaded.options, ranks, loaded.file_data, loaded.unnamed
    return ServedParts(paths, loaded.models, task, task.observer, codec, *told)


def _paths(path: Any) -> list[str]:
    if isinstance(path, str | os.PathLike):
        text = os.fspath(path)
        return [text] if os.path.exists(text) else utils.split_paths(text)
    if not isinstance(path, list | tuple) or not path:
        raise OptionError(f"path must name a checkpoint, or be a list of such names, got {path!r}")
    return [os.fspath(each) for each in path]


def _overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return read_overrides(options.get("model_overrides"), "model_overrides")
    except ValueError as error:
        raise OptionError(str(error)) from None


def _codec(loaded: LoadedModels) -> TextCodec:
    args = loaded.args
    try:
        return TextCodec(loaded.task, args)
    except (OSError, ValueError, ImportError) as error:
        wanted = [f"{name}={getattr(args, name)!r}" for name in ("tokenizer", "bpe") if getattr(args, name) is not None]
        raise OptionError(f"{' and '.join(wanted)} must have what they need: {one_line(error)}") from error


def _put_into_service(model: torch.nn.Module, cfg: DictConfig) -> None:
    """As fairseq's commands do once a model has its weights."""
    if cfg.common.fp16:
        model.half()
    if torch.cuda.is_available() and not cfg.common.cpu:
        model.cuda()
    model.prepare_for_inference_(cfg)
