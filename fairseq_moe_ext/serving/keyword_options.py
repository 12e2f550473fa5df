"""The commands' options by keyword: which `load()` and a served model's methods take, and what fairseq makes of them.

Values go through fairseq's own parsers, so that they mean what they mean to a command. No parser reads sys.argv.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from fairseq import options as fairseqs
from fairseq.dataclass.configs import CommonConfig, CommonEvalConfig, DatasetConfig, EvalLMConfig, GenerationConfig
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from omegaconf import MISSING, DictConfig, OmegaConf

from fairseq_moe_ext.decoding.option_rules import check_beams, check_pairs, check_values

# of a call: how it searches and makes batches
SEARCH = (
    *("beam", "nbest", "max_len_a", "max_len_b", "min_len", "match_source_len", "unnormalized", "lenpen", "unkpen"),
    *("no_repeat_ngram_size", "sampling", "sampling_topk", "sampling_topp", "temperature"),
    *("diverse_beam_groups", "diverse_beam_strength", "diversity_rate", "seed"),
)
BATCHES = ("batch_size", "max_tokens")
# of loading: where and in which dtype the model computes, what its text and its data are
MODEL = (
    *("cpu", "fp16", "model_overrides", "retain_dropout", "retain_dropout_modules"),
    "skip_invalid_size_inputs_valid_test",
)
TEXT = ("tokenizer", "bpe", "post_process", "remove_bpe")
FLAGS = (
    *("moe_gating", "moe_eval_capacity_token_fraction", "moe_dtype", "moe_kernel", "moe_weights"),
    *("moe_weights_scope", "moe_report", "moe_report_weight_error", "moe_trace", "moe_record"),
    *("expert_buffer_size", "expert_buffer_scope", "expert_eviction", "expert_order", "expert_store"),
    *("expert_store_dir", "expert_host_memory", "expert_prefetch", "expert_profile"),
    *("moe_capacity_factor", "moe_overflow"),
    *("moe_drop_metric", "moe_capacity_scope", "moe_capacity_phases", "moe_renormalize_after_drop"),
    *("moe_virtual_ranks", "moe_reroute_prefer", "expert_placement", "expert_keep"),
    "moe_second_choice_threshold",
)
# task -> its own options, beside those above
TASKS = {
    "moe_translation": (
        *("source_lang", "target_lang", "max_source_positions", "max_target_positions", "print_alignment"),
        "constraints",
    ),
    "moe_translation_multi_simple_epoch": (
        *("source_lang", "target_lang", "max_source_positions", "max_target_positions", "langs", "lang_dict"),
        *("lang_pairs", "fixed_dictionary", "source_dict", "target_dict", "lang_tok_style", "encoder_langtok"),
        "decoder_langtok",
        *("lang_tok_replacing_bos_eos", "langtoks", "keep_inference_langtok", "add_data_source_prefix_tags"),
        *("add_ssl_task_tokens", "finetune_dict_specs", "print_alignment"),
    ),
    "moe_language_modeling": (
        *("tokens_per_sample", "add_bos_token", "output_dictionary_size", "self_target", "future_target"),
        *("past_target", "softmax_batch"),
    ),
}
_TEXT = ("tokenizer", "bpe")  # each choice there brings options of its own
# of the commands' parsers, which the parser here is not
_COMMANDS_ALONE = ("path", "input", "buffer_size", "criterion", "optimizer", "lr_scheduler", "scoring")
_ALIASES = {"remove_bpe": "post_process"}


class OptionError(ValueError):
    """An option by keyword that is not known, or whose value is not what it must be."""


class KeywordOptions:
    """The options of `task`, one of TASKS, as keywords."""

    def __init__(self, task: str):
        self._task = task
        self._parsers: dict[tuple, tuple[argparse.ArgumentParser, frozenset[str]]] = {}

    def parse(self, data: str, options: Mapping[str, Any], every: bool = False) -> argparse.Namespace:
        """All fields that a command's parser makes of `data` and these options; None stands for an option's default.

        every: also of options that have no effect here, but where the caller goes on. OptionError names the keyword,
        the rule and the value.
        """
        given = {_ALIASES.get(name, name): value for name, value in options.items() if value is not None}
        parser, known = self._parser(given.get("tokenizer"), given.get("bpe"))
        actions = {action.dest: action for action in parser._actions}
        for name in given:
            if name not in known and not every:
                raise OptionError(self._refusal(name, known, actions))
        arguments = [data]
        for name, value in given.items():
            arguments += _arguments(actions[name], name, value)
        args = parser.parse_args(arguments)
        # what fairseq's `parse_args_and_arch` makes of them
        args.no_seed_provided = args.seed is None
        args.seed = 1 if args.seed is None else args.seed
        args.tpu = False
        args.update_epoch_batch_itr = args.grouped_shuffling
        args.batch_size_valid, args.max_tokens_valid = args.batch_size, args.max_tokens
        _check(parser, given, args)
        for name in _TEXT:
            missing = [field for field, value in vars(args).items() if value == MISSING and field not in given]
            if getattr(args, name) is not None and missing:
                raise OptionError(f"{missing[0]} must be given with {name}={getattr(args, name)!r}, got none")
        return args

    def words(self, options: Mapping[str, Any]) -> list[str]:
        """These options as a command line has them; OptionError as of `parse`."""
        actions = {action.dest: action for action in self._parser(None, None)[0]._actions}
        return [word for name, value in options.items() for word in _arguments(actions[name], name, value)]

    def of_parser(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `options` that fairseq's parser has, also where `parse` refuses them."""
        parser, _ = self._parser(options.get("tokenizer"), options.get("bpe"))
        names = {action.dest for action in parser._actions if action.option_strings} - {"task"} | set(_ALIASES)
        return {name: value for name, value in options.items() if name in names}

    def _parser(self, *choices: str | None) -> tuple[argparse.ArgumentParser, frozenset[str]]:
        """fairseq's parser of the command that serves the task, and the names of its options that work here."""
        if choices in self._parsers:
            return self._parsers[choices]
        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        parser.error = _raise
        gen_parser_from_dataclass(parser, CommonConfig())
        fairseqs.add_dataset_args(parser, gen=True)
        fairseqs.add_generation_args(parser)
        gen_parser_from_dataclass(parser, EvalLMConfig())
        parser.add_argument("--task", default=self._task)
        TASK_REGISTRY[self._task].add_args(parser)
        before = {action.dest for action in parser._actions}
        for name, choice in zip(_TEXT, choices, strict=True):
            known = REGISTRIES[name]["registry"]
            if choice is not None and choice not in known:
                raise OptionError(f"{name} must be one of {', '.join(sorted(known))}, got {choice!r}")
            parser.add_argument(f"--{name}", default=None)
            if choice is not None:
                _add_options(parser, known[choice])
        of_text = {action.dest for action in parser._actions} - before
        names = frozenset(of_text | {*SEARCH, *BATCHES, *MODEL, *TEXT, *FLAGS, *TASKS[self._task]} - set(_ALIASES))
        self._parsers[choices] = parser, names
        return parser, names

    def _refusal(self, name: str, known: Iterable[str], actions: Iterable[str]) -> str:
        if name in _options_of_text():
            return f"{name} must go with the bpe or the tokenizer whose option it is, got it without"
        other = [task for task, names in TASKS.items() if name in names]
        if other:
            return f"{name} must go with a model of {' or '.join(other)}, got one of {self._task}"
        if name in actions or name in _COMMANDS_ALONE:
            return f"{name} must not be given: it has an effect in fairseq's commands alone, or none with {self._task}"
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"{name} must be an option of fairseq's commands or of this plugin, and is not{meant}"


def configuration(args: argparse.Namespace) -> DictConfig:
    """The groups of fairseq's configuration that serving reads, with the fields of `args`."""
    return _groups(args)


def task_configuration(args: argparse.Namespace) -> DictConfig | argparse.Namespace:
    """What fairseq's `setup_task` takes for the task of `args`."""
    fields_of_task = TASK_DATACLASS_REGISTRY.get(args.task)
    if fields_of_task is None:
        return args
    return OmegaConf.create({**_groups(args, task=fields_of_task).task, "_name": args.task})


def text_configuration(args: argparse.Namespace, name: str) -> DictConfig | None:
    """What fairseq's `build_tokenizer` or `build_bpe` takes for the one that `args` name."""
    choice = getattr(args, name)
    if choice is None:
        return None
    fields_of_choice = REGISTRIES[name]["dataclass_registry"].get(choice)
    return OmegaConf.create(
        {**({} if fields_of_choice is None else vars(fields_of_choice.from_namespace(args))), "_name": choice}
    )


def criterion_configuration(fields: Mapping[str, Any]) -> DictConfig | None:
    """What fairseq's `build_criterion` takes for the loss of a checkpoint: fairseq's default where the checkpoint names
    none; None where fairseq does not know it."""
    name = fields.get("_name") or "cross_entropy"
    fields_of_loss = REGISTRIES["criterion"]["dataclass_registry"].get(name)
    if fields_of_loss is None:
        return None
    found = {}
    for field, value in vars(fields_of_loss()).items():
        found[field] = fields.get(field, value)
        if isinstance(found[field], str) and found[field].startswith("${"):  # of a training
            found[field] = "legacy_ddp" if field == "ddp_backend" else False
    return OmegaConf.create({**found, "_name": name})


def _groups(args: argparse.Namespace, **more: type) -> DictConfig:
    """Interpolations between groups resolved; fairseq's own way there clears a program's Hydra."""
    groups = {"common": CommonConfig, "common_eval": CommonEvalConfig, "dataset": DatasetConfig}
    groups |= {"generation": GenerationConfig, "eval_lm": EvalLMConfig, **more}
    found = {}
    for name, group in groups.items():
        given = vars(group.from_namespace(args))
        found[name] = {field: value.value if isinstance(value, Enum) else value for field, value in given.items()}
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.create(found), resolve=True))


def _raise(message: str) -> NoReturn:
    raise OptionError(re.sub(r"^argument --([\w-]+)(/\S+)?:", lambda found: found[1].replace("-", "_"), message))


def _arguments(action: argparse.Action, name: str, value: Any) -> list[str]:
    """As a command line has the option, whose value must be of the kind that it takes."""
    option = action.option_strings[0] if action.option_strings else None
    if isinstance(value, Path | Enum):
        value = value.value if isinstance(value, Enum) else str(value)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be True or False, got {value!r}")
        return [option] if value is action.const else []
    if value is True and action.const is not None:
        return [option]
    if isinstance(value, Mapping):
        value = repr(dict(value))
    if isinstance(value, list | tuple):
        words = [str(item) for item in value]
        if action.nargs in ("+", "*"):
            return [option, *words]
        value = ",".join(words)
    if not isinstance(value, str | int | float):
        raise OptionError(f"{name} must be a word, a number, a list or a mapping, got {type(value).__name__}")
    return [f"{option}={value}"]


def _add_options(parser: argparse.ArgumentParser, choice: type) -> None:
    """Those of a tokenizer or a BPE."""
    if hasattr(choice, "add_args"):
        choice.add_args(parser)
    elif getattr(choice, "__dataclass", None) is not None:
        gen_parser_from_dataclass(parser, getattr(choice, "__dataclass")())


def _options_of_text() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for name in _TEXT:
        for choice in REGISTRIES[name]["registry"].values():
            _add_options(parser, choice)
    return {action.dest for action in parser._actions}


def _check(parser: argparse.ArgumentParser, given: Iterable[str], args: argparse.Namespace) -> None:
    """What fairseq dies of, or takes for something else; an option that says its default says nothing."""
    own = {name: getattr(args, name) for name in given if getattr(args, name) != parser.get_default(name)}
    try:
        check_values(own, str)
        check_pairs(own, str)
        check_beams(args, str)
    except ValueError as error:
        raise OptionError(str(error)) from None
    if getattr(args, "print_alignment", None) == "soft":
        raise OptionError("print_alignment must be 'hard', got 'soft', which is for fairseq-generate alone")
