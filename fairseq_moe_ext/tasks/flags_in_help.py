"""`--help` of fairseq's commands with the plugin's flags in it.

fairseq prints its help while it asks which task is meant, before that task has added an argument. So where a command
of fairseq's own is asked for help, the arguments that its task, and fairseq-train's model and criterion, would add are
added first. In every other process this changes nothing.
"""

from __future__ import annotations

import functools
import sys
from argparse import ArgumentParser

from fairseq import options
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

from fairseq_moe_ext.checkpoints.moe_config import MoEModelFields
from fairseq_moe_ext.reporting.own_command import fairseqs_command
from fairseq_moe_ext.tasks.flags import MoEFlags

TASKS = "moe_translation, moe_translation_multi_simple_epoch or moe_language_modeling"


def answer_help() -> None:
    """Have fairseq's parsers know these flags where this process is a command of fairseq's that is asked for help."""
    parse = options.parse_args_and_arch
    if fairseqs_command() is None or not {"-h", "--help"} & set(sys.argv[1:]):
        return

    @functools.wraps(parse)
    def parse_with_flags(parser, *args, **kwargs):
        add_flags(parser, sys.argv[1:])
        return parse(parser, *args, **kwargs)

    options.parse_args_and_arch = parse_with_flags


def add_flags(parser: ArgumentParser, arguments: list[str]) -> None:
    """Add to `parser`, for its help, the plugin's flags in groups of their own, and those of what is asked for.

    arguments: the command line, which may name --task, --arch and --criterion.
    """
    asked, _ = _chooser().parse_known_args(arguments)
    scratch = _scratch()
    gen_parser_from_dataclass(scratch, MoEFlags())
    _move(scratch, parser, f"fairseq_moe_ext (with --task {TASKS})")
    if "--path" not in parser._option_string_actions:  # fairseq-train
        scratch = _scratch()
        gen_parser_from_dataclass(scratch, MoEModelFields(), delete_default=True)
        _move(scratch, parser, "fairseq_moe_ext's models (with --arch moe_transformer... or moe_transformer_lm...)")
        model = ARCH_MODEL_REGISTRY.get(asked.arch) or MODEL_REGISTRY.get(asked.arch)
        _add(parser, model, f"--arch {asked.arch}")
        _add(parser, REGISTRIES["criterion"]["registry"].get(asked.criterion), f"--criterion {asked.criterion}")
    _add(parser, TASK_REGISTRY.get(asked.task), f"--task {asked.task}")


def _chooser() -> ArgumentParser:
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (("--task",), ("--arch", "-a"), ("--criterion",)):
        chooser.add_argument(*flags, nargs="?")
    return chooser


def _scratch() -> ArgumentParser:
    return ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")


def _add(parser: ArgumentParser, cls: type | None, title: str) -> None:
    """What a class of fairseq's registries adds to a command line."""
    if cls is None or not hasattr(cls, "add_args"):
        return
    scratch = _scratch()
    cls.add_args(scratch)
    _move(scratch, parser, title)


def _move(scratch: ArgumentParser, parser: ArgumentParser, title: str) -> None:
    """What `parser` does not know yet goes into a group of that title."""
    known = {action.dest for action in parser._actions}
    new = [action for action in scratch._actions if action.dest not in known]
    group = parser.add_argument_group(title) if new else None
    for action in new:
        group._add_action(action)
