"""What `fairseq-moe compare` starts: fairseq's own command in a process of its own, for one setting and language pair.

Its argument is JSON: `checks`, a list of what makes a Check, or `serve`, what makes a Serve. What comes of them is
written to files of their folders.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_scorer import SequenceScorer
from omegaconf import DictConfig

import fairseq_moe_ext
from fairseq_moe_ext.atomic_file import write_bytes, write_json
from fairseq_moe_ext.checkpoints.checkpoint_task import SERVED
from fairseq_moe_ext.checkpoints.dictionary_checksum import dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.command_line.parsing import failed
from fairseq_moe_ext.reporting.routing_recorder import RoutingRecorder
from fairseq_moe_ext.serving import fairseq_hooks
from fairseq_moe_ext.serving.keyword_options import KeywordOptions, OptionError
from fairseq_moe_ext.serving.load import register
from fairseq_moe_ext.serving.load_models import options_of_checkpoint, task_of_state
from fairseq_moe_ext.serving.model_overrides import read_overrides
from fairseq_moe_ext.serving.served_state import served_state
from fairseq_moe_ext.tasks.refused_options import EVAL_LM, GENERATE, LM, MULTI
from fairseq_moe_ext.tasks.serving_task import ServingTask

REPORT, FIGURES, ROUTING = "report.json", "figures.json", "routing.npz"
_USER_DIR = fairseq_moe_ext.__path__[0]  # as fairseq asks for it, links in it as they are


@dataclass(frozen=True)
class Check:
    """Look at a setting before any is served: `checked` of what it is goes into `<name>.json` of the folder.

    name: of the setting. path, flags: of it. data: the folder that is served. pairs: the languages of a multilingual
    model that are asked for; none: those that the flags say.
    """

    folder: str
    name: str
    path: str
    data: str
    flags: list[str]
    pairs: list[list[str]]

    def run(self) -> None:
        """Errors are those of the command, or CheckpointError."""
        try:
            task, words = self._task()
        except (CheckpointError, OptionError) as error:
            sys.exit(failed(error))
        command = EVAL_LM if task == LM else GENERATE
        # fairseq-eval-lm would start as many processes as there are GPUs
        words += ["--distributed-world-size", "1"] if command == EVAL_LM else []
        words = ["--user-dir", _USER_DIR, "--task", task, "--path", self.path, *words, *self.flags]
        found: list[dict[str, Any]] = []
        for pair in self.pairs or [[]]:
            arguments = [self.data, *words, *_languages(pair)]
            run_command(command, arguments, lambda cfg, _main, arguments=arguments: found.append(
                {"command": command, "arguments": arguments, "task": task, **checked(cfg)}
            ))  # fmt: skip
        write_json(Path(self.folder, f"{self.name}.json"), found)

    def _task(self) -> tuple[str, list[str]]:
        """The checkpoint's task, of an ensemble the first one's, and the options that it sets."""
        state = served_state(self.path if Path(self.path).exists() else utils.split_paths(self.path)[0])
        task = task_of_state(state)
        if self.pairs and task != MULTI:
            raise OptionError(f"--lang-pairs is for a multilingual model, got {self.path}, which is of {task}")
        words = KeywordOptions(task).words(options_of_checkpoint(state, with_data=False))
        if self.pairs and not any(word.startswith(("--langs", "--lang-pairs")) for word in words):
            words += ["--lang-pairs", ",".join(map("-".join, self.pairs))]
        return task, words


@dataclass(frozen=True)
class Serve:
    """Run the command, and score its references; REPORT, FIGURES and ROUTING go into the folder."""

    folder: str
    command: str
    arguments: list[str]

    def run(self) -> None:
        """Errors are those of the command."""
        run_command(self.command, [*self.arguments, "--moe-report", str(Path(self.folder, REPORT))], self._serve)

    def _serve(self, cfg: DictConfig, main: Callable[[DictConfig], Any]) -> None:
        recorder = RoutingRecorder()
        with recorder.watching(), _loaded() as loaded:
            results = main(cfg)
            models, task = loaded[0]
            if self.command == GENERATE:
                score_references(models, task, cfg)
        perplexity = math.exp(-recorder.log_probability / max(recorder.tokens, 1))
        if self.command == EVAL_LM:  # which may count by word, or leave a first token out
            perplexity = float(results["perplexity"])
        figures = {"perplexity": perplexity, "scored_tokens": recorder.tokens, "dense_bytes": dense_bytes(models[0])}
        write_json(Path(self.folder, FIGURES), figures)
        write_bytes(Path(self.folder, ROUTING), recorder.routed_tokens().pack())


def run_command(command: str, arguments: list[str], instead: Callable[[DictConfig, Callable], Any]) -> None:
    """fairseq's command of these arguments, up to its configuration, with which `instead` and the command's own `main`
    are called. From here on this process is that command to whoever asks, and tells its errors as it does."""
    module = importlib.import_module(f"fairseq_cli.{command}")
    main = module.main
    sys.modules["__main__"] = module
    sys.argv = [f"fairseq-{command.replace('_', '-')}", *arguments]

    def with_configuration(cfg: DictConfig | Namespace, **_more) -> None:
        instead(convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg, main)

    module.main = with_configuration
    try:
        module.cli_main()
    finally:
        module.main = main


def checked(cfg: DictConfig) -> dict[str, Any]:
    """What must be alike in two settings, once the task and its data are there and fit the checkpoint."""
    utils.import_user_module(cfg.common)
    task = tasks.setup_task(cfg.task)
    overrides = read_overrides(cfg.common_eval.model_overrides, "--model-overrides")
    rows: set[int] = set()
    for path in utils.split_paths(cfg.common_eval.path):
        state = served_state(path, overrides)["task_state"]
        rows |= state[SERVED].rows
        task.load_state_dict(state)
    task.load_dataset(cfg.dataset.gen_subset)
    if getattr(task.dataset(cfg.dataset.gen_subset), "tgt", task) is None:
        raise ValueError(f"DATA must have references to compare with, got none in {cfg.dataset.gen_subset}")
    flags = getattr(task, "args", None) or task.cfg
    languages = [getattr(flags, name, None) for name in ("source_lang", "target_lang")]
    dictionaries = (task.source_dictionary, task.target_dictionary)
    scoring = cfg.get("scoring") or {}
    text = [(cfg.get(name) or {}).get("_name") for name in ("bpe", "tokenizer")]
    return {
        "part": "-".join(languages) if all(languages) else str(cfg.dataset.gen_subset),
        "rows": sorted(rows),
        "dictionaries": [dictionary_checksum(dictionary.symbols) for dictionary in dictionaries],
        "text": [str(each or "none") for each in (cfg.common_eval.post_process, *text)],
        "tokenizer": str(scoring.get("sacrebleu_tokenizer", "13a")),
        "lowercase": bool(scoring.get("sacrebleu_lowercase", False)),
    }


@torch.no_grad()
def score_references(models: list[torch.nn.Module], task: Any, cfg: DictConfig) -> None:
    """Score the references of the data that a command has served, as `--score-reference` does; the report knows nothing
    of it."""
    scorer = SequenceScorer(task.target_dictionary)
    positions = utils.resolve_max_positions(task.max_positions(), *(model.max_positions() for model in models))
    epoch = super(ServingTask, task).get_batch_iterator(  # of fairseq's own task
        dataset=task.dataset(cfg.dataset.gen_subset),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=positions,
        ignore_invalid_inputs=cfg.dataset.skip_invalid_size_inputs_valid_test,
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        seed=cfg.common.seed,
        num_shards=cfg.dataset.num_shards,
        shard_id=cfg.dataset.shard_id,
        disable_iterator_cache=True,
    )
    on_gpu = next(models[0].parameters()).is_cuda
    for number, sample in enumerate(epoch.next_epoch_itr(shuffle=False)):
        if "net_input" not in sample:  # fills up a part of the data
            continue
        task.observer.seeds.begin(number)
        scorer.generate(models, utils.move_to_cuda(sample) if on_gpu else sample)


def dense_bytes(model: torch.nn.Module) -> int:
    """Of the weights and buffers in memory that are no experts'; what is shared is counted once."""
    layers = model.moe_layers().values() if hasattr(model, "moe_layers") else ()
    of_experts = {id(module) for layer in layers for module in _modules(layer.experts)}
    found = {}
    for module in model.modules():
        if id(module) not in of_experts:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _modules(experts: Any) -> Iterator[torch.nn.Module]:
    if isinstance(experts, torch.nn.Module):
        yield from experts.modules()


def _languages(pair: list[str]) -> list[str]:
    return [word for option, language in zip(("-s", "-t"), pair, strict=False) for word in (option, language)]


@contextmanager
def _loaded() -> Iterator[list[tuple[list[torch.nn.Module], Any]]]:
    """In this context (models, their task) of every loading by fairseq's function are kept, in order."""
    register()  # with it the plugin's own function is in place
    fairseq_hooks.install()
    load, found = checkpoint_utils.load_model_ensemble_and_task, []

    def keeping(*args, **kwargs):
        models, cfg, task = load(*args, **kwargs)
        found.append((models, task))
        return models, cfg, task

    checkpoint_utils.load_model_ensemble_and_task = keeping
    try:
        yield found
    finally:
        checkpoint_utils.load_model_ensemble_and_task = load


def main(arguments: Sequence[str]) -> int:
    """Do what the one argument says; returns the exit code. Errors of a command are raised for its own hook."""
    logging.disable(logging.INFO)
    order = json.loads(arguments[0])
    register()
    for each in order.get("checks", ()):
        Check(**each).run()
    if "serve" in order:
        Serve(**order["serve"]).run()
    return 0
