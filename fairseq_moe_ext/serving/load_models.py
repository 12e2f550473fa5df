"""Checkpoints -> models and the task that serves them, where no command has set one up."""

from __future__ import annotations

import ast
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import tasks as fairseqs
from fairseq.registry import REGISTRIES
from omegaconf import DictConfig, open_dict

from fairseq_moe_ext.buffering.expert_profile import goes_by_languages
from fairseq_moe_ext.checkpoints.checkpoint_task import DATA_FIELDS, SERVED, CheckpointTask, is_multilingual
from fairseq_moe_ext.checkpoints.quantized_state import is_quantized
from fairseq_moe_ext.ranks.group import world_size
from fairseq_moe_ext.ranks.program import ProgramRanks
from fairseq_moe_ext.reporting.program_observer import ProgramObserver
from fairseq_moe_ext.serving.device_flags import check_device_flags
from fairseq_moe_ext.serving.file_data import TEXT_OPTIONS, FileData
from fairseq_moe_ext.serving.keyword_options import (
    TASKS,
    KeywordOptions,
    OptionError,
    configuration,
    criterion_configuration,
    task_configuration,
    text_configuration,
)
from fairseq_moe_ext.serving.recorded_languages import recorder_of
from fairseq_moe_ext.serving.served_state import served_state

LANGUAGES = ("source_lang", "target_lang")


@dataclass(frozen=True)
class LoadedModels:
    """models: of an ensemble several, with their weights, on the CPU. data, options: as they were parsed, with what
    the checkpoint says of its task; args: what came of them. file_data: where a quantised checkpoint's file has what
    stands for data. unnamed: of a multilingual model the options of languages that each call must name."""

    models: list[torch.nn.Module]
    task: Any
    keywords: KeywordOptions
    data: str
    options: dict[str, Any]
    args: Namespace
    model_cfg: Namespace
    criterion: dict[str, Any]
    file_data: FileData | None = None
    unnamed: frozenset[str] = frozenset()

    def configuration(self) -> DictConfig:
        """As fairseq has it of a checkpoint; what a training left there is not in it."""
        cfg = configuration(self.args)
        with open_dict(cfg):
            cfg._set_flag("allow_objects", True)
            cfg.model, cfg.task = self.model_cfg, task_configuration(self.args)
            cfg.criterion = criterion_configuration(self.criterion)
            cfg.tokenizer, cfg.bpe = (text_configuration(self.args, name) for name in ("tokenizer", "bpe"))
        return cfg


def check_alone(path: str) -> None:
    """ValueError in one of several ranks, which nothing keeps in step where fairseq's own functions serve."""
    if world_size() > 1:
        raise ValueError(
            f"{path} must be loaded by fairseq's functions in one process, got {world_size()} ranks: fairseq's "
            "commands and fairseq_moe_ext.load serve with several"
        )


def overrides_of_command_line(given: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq-validate's command line, which it hands on as overrides -> what overrides the checkpoint.

    That is what `--model-overrides` names, and the loss of `--criterion`; the other options are held against the
    checkpoint, as in every command.
    """
    overrides = ast.literal_eval(given.get("model_overrides") or "{}")
    fields_of_loss = REGISTRIES["criterion"]["dataclass_registry"].get(given.get("criterion"))
    if fields_of_loss is not None:
        names = vars(fields_of_loss()).keys() & given.keys()
        overrides["criterion"] = {"criterion": given["criterion"], **{name: given[name] for name in names}}
    return overrides


def load_models(
    paths: Sequence[str],
    data: str | os.PathLike | None,
    options: Mapping[str, Any],
    overrides: Mapping[str, Any],
    observer: type[ProgramObserver] | None = None,
    of_parser: bool = False,
    ranks: ProgramRanks | None = None,
) -> LoadedModels:
    """The models of the checkpoints at `paths`, which make an ensemble, under `overrides` (`--model-overrides`).

    data: where the dictionaries are; None: in the first checkpoint where it is quantised, else beside it. options: as
    KeywordOptions takes them, above what the checkpoint says of its task. observer: of what is served; None: one that
    ends with the process. of_parser: options may be any that fairseq's parser has, which its own callers look at, and
    others; the checkpoint also says how it read its data, and of a multilingual one all language pairs may be read.
    ranks: among which this one serves.
    OptionError, CheckpointError, ValueError.
    """
    state = served_state(paths[0], overrides)
    keywords = KeywordOptions(task_of_state(state))
    if of_parser:
        options = keywords.of_parser(options)
    options = {**options_of_checkpoint(state, with_data=of_parser), **options}
    own = None
    if data is None and is_quantized(paths[0]):
        own = FileData(paths[0])
        options = {**options_of_file(own, state, options), **options}
    data = os.fspath(own.folder if own is not None else Path(paths[0]).parent if data is None else data)
    args = keywords.parse(data, options, every=of_parser)
    unnamed = frozenset() if of_parser else _name_languages(args, state, own)
    if unnamed and args.expert_profile is not None and goes_by_languages(Path(args.expert_profile)):
        raise OptionError(f"expert_profile must go with {' and '.join(sorted(unnamed))}, by which it chooses experts")
    check_device_flags(args)
    task = _set_up(args, ranks)
    if observer is not None:
        outputs = args.moe_report, args.moe_trace, ranks, int(args.moe_report_weight_error or 0)
        task.observer = observer(str(args.moe_gating), *outputs, recorder_of(args, task))
    models = [_model(task, state)]
    models += [_model(task, served_state(path, overrides)) for path in paths[1:]]
    found = data, options, args, state["cfg"].model, state["criterion"]
    return LoadedModels(models, task, keywords, *found, own, unnamed)


def options_of_file(own: FileData, state: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a quantised checkpoint's own files are for; how a text is cut stands above them where it is `given`."""
    served: CheckpointTask = state["task_state"][SERVED]
    found = own.options(is_multilingual(served.fields), bool(given.get("langs") or given.get("lang_dict")))
    kept = state["model"].kept
    if kept is not None and all(kept.languages):
        found |= dict(zip(LANGUAGES, kept.languages, strict=True))  # it can be asked for no others
    return found if any(name in given for name in TEXT_OPTIONS) else found | own.text_options()


def _name_languages(args: Namespace, state: Mapping[str, Any], own: FileData | None) -> frozenset[str]:
    """Let a multilingual model be set up for some languages where the user has named none; gives what is unnamed.

    OptionError where the dictionaries do not lie in the checkpoint, for they depend on the languages.
    """
    if args.task != "moe_translation_multi_simple_epoch":
        return frozenset()
    served: CheckpointTask = state["task_state"][SERVED]
    unnamed = frozenset(name for name in LANGUAGES if getattr(args, name) is None)
    if unnamed and args.expert_keep is not None:
        raise OptionError(
            "expert_keep needs source_lang and target_lang, for which experts are kept, got "
            f"{args.expert_keep} without {sorted(unnamed)[0]}"
        )
    for name in LANGUAGES:
        if name in unnamed and (own is None or not served.languages):
            raise OptionError(f"{name} must be given for a multilingual model, got none")
        setattr(args, name, getattr(args, name) or served.languages[0])
    if args.lang_pairs is None and own is not None:
        args.lang_pairs = f"{args.source_lang}-{args.target_lang}"
    return unnamed


def _set_up(args: Namespace, ranks: ProgramRanks | None) -> Any:
    try:
        return fairseqs.setup_task(task_configuration(args), ranks=ranks)
    except FileNotFoundError as error:
        missing = error.filename or str(error).partition(": ")[0]
        raise OptionError(
            f"data must be a folder with the model's dictionaries, got {args.data}: {missing} is not there"
        ) from error


def task_of_state(state: Mapping[str, Any]) -> str:
    """The task that serves a checkpoint, of its state as `served_state` gives it."""
    if not any(key.startswith("encoder.") for key in state["model"]):
        return "moe_language_modeling"
    served: CheckpointTask = state["task_state"][SERVED]
    return "moe_translation_multi_simple_epoch" if is_multilingual(served.fields) else "moe_translation"


def options_of_checkpoint(state: Mapping[str, Any], with_data: bool = False) -> dict[str, Any]:
    """What the checkpoint says of its task's options; paths in it stay where they are.

    with_data: how its data were read, too.
    """
    served: CheckpointTask = state["task_state"][SERVED]
    truths = {"True": True, "False": False}  # of the multilingual task
    known = set(TASKS[task_of_state(state)]) - {"lang_dict"} - set(DATA_FIELDS)
    if with_data:
        known |= set(DATA_FIELDS)
    if is_multilingual(served.fields):
        known -= {"source_lang", "target_lang"}
    given = {name: value for name, value in served.fields.items() if name in known and value not in (None, "", [])}
    return given | {name: truths[value] for name, value in given.items() if value in ("True", "False")}


def _model(task: Any, state: dict[str, Any]) -> torch.nn.Module:
    """As fairseq's `load_model_ensemble` makes it."""
    model_cfg = state["cfg"].model
    task.load_state_dict(state["task_state"])
    model = task.build_model(model_cfg, from_checkpoint=True)
    model.set_num_updates(state["optimizer_history"][-1]["num_updates"])
    model.load_state_dict(state["model"], strict=True, model_cfg=model_cfg)
    return model
