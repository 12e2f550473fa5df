"""The serving commands' parsers under several ranks, which fairseq does not know when it serves.

fairseq-generate would translate one part of the data and say nothing; fairseq-eval-lm dies on a CPU before any task is
asked. So `--distributed-world-size N` starts N ranks, or is refused; never is a part of the data served for the whole.
What a whole command line says is looked at first (command_check.py).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from functools import partial

import torch
from fairseq import utils

from fairseq_moe_ext.ranks.group import GRACE_PERIOD, local_ranks, tell_errors_once, world_size
from fairseq_moe_ext.ranks.launch import start_ranks
from fairseq_moe_ext.reporting.error_sentences import tell_in_a_sentence
from fairseq_moe_ext.reporting.own_command import fairseqs_command
from fairseq_moe_ext.tasks.command_check import check_command, check_ranks, with_suffix
from fairseq_moe_ext.tasks.contradicting_options import EVAL_LMS_BPE, check_contradictions
from fairseq_moe_ext.tasks.file_as_data import take_data_from_file
from fairseq_moe_ext.tasks.flag import check_needs
from fairseq_moe_ext.tasks.flags import MoEFlags
from fairseq_moe_ext.tasks.refused_options import (
    EVAL_LM,
    GENERATE,
    INTERACTIVE,
    TRAIN,
    VALIDATE,
    check_refused,
    given_options,
    written_options,
)

# an option that no command before it has -> the command that has it; fairseq-interactive has fairseq-generate's, too
_COMMANDS = {"--input": INTERACTIVE, "--output-word-probs": EVAL_LM, "--beam": GENERATE}
_SERVED_BY_RANKS = (EVAL_LM, GENERATE, VALIDATE)


def prepare_parser(parser: ArgumentParser) -> None:
    """Let a command's parser refuse what cannot take effect, and make a serving one's fit for several ranks."""
    options = getattr(parser, "_option_string_actions", {})
    if "--distributed-world-size" not in options:
        return
    tell_in_a_sentence()
    if "--path" not in options:
        _check_what_is_parsed(parser, TRAIN)
        return
    command = next((command for option, command in _COMMANDS.items() if option in options), VALIDATE)
    _check_what_is_parsed(parser, command)
    options["--distributed-world-size"].type = partial(_number_of_ranks, command)
    if "--replace-unk" in options:
        options["--replace-unk"].const = ""  # fairseq would open a file of the name "@@ "
    options["--distributed-init-method"].type = lambda _text: None  # the plugin starts the group
    if world_size() == 1:
        return
    rank = int(os.environ["RANK"])
    tell_errors_once(rank, world_size())
    if rank > 0:
        _print_nothing(parser)
    if command not in _SERVED_BY_RANKS:
        _refuse(parser, f"{command} is served by one process, got {world_size()} ranks: start it without torchrun")
    _choose_gpu(parser)


def _check_what_is_parsed(parser: ArgumentParser, command: str) -> None:
    """Refuse what cannot take effect (ValueError) in what the parser reads from now on; then start ranks if asked to.

    Whether files and hardware are there is looked at in fairseq's own commands alone (command_check.py).
    """
    parse = parser.parse_known_args

    def parse_known_args(*args, **kwargs):
        found, rest = parse(*args, **kwargs)
        given = given_options(parser, found)
        check_refused(command, found.task, given, found)
        if command != TRAIN:
            written = written_options(parser, parse, args[0] if args else kwargs.get("args"))
            check_needs(MoEFlags, found, written)
            take_data_from_file(command, found, written)
            check_contradictions(command, found.task, given, found)
        if getattr(found, "sacrebleu", False) and "scoring" not in given:
            found.scoring = "sacrebleu"  # fairseq reads it no more, but NLLB's commands say so
        if command == EVAL_LM and found.post_process == "subword_nmt":
            found.post_process = EVAL_LMS_BPE
        if fairseqs_command() == command and not rest:
            check_command(found)
            _start_ranks(command, found)
        return found, rest

    parser.parse_known_args = parse_known_args  # parse_args calls it


def _refuse(parser: ArgumentParser, reason: str) -> None:
    if int(os.environ["RANK"]) > 0:
        parser.error(reason)
    parser.exit(2, f"{parser.prog}: error: {reason}\n")  # parser.error prints hundreds of lines before


def _print_nothing(parser: ArgumentParser) -> None:
    """Rank 0 prints, logs and writes for all; the others only tell of errors that are their own."""
    logging.disable(logging.WARNING)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
    parser.set_defaults(log_format="none")
    options = parser._option_string_actions
    if "--results-path" in options:
        options["--results-path"].type = lambda _text: None
    options["--log-format"].type = lambda _text: "none"
    parser.error = lambda _message: (time.sleep(GRACE_PERIOD), sys.exit(2))


def _choose_gpu(parser: ArgumentParser) -> None:
    """Every rank of a machine its own GPU."""
    if not torch.cuda.is_available() or "--cpu" in sys.argv:
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_ranks() > torch.cuda.device_count():
        _refuse(
            parser,
            f"ranks on one machine must not outnumber its GPUs ({torch.cuda.device_count()}), got {local_ranks()}; "
            "--cpu serves without them",
        )
    torch.cuda.set_device(local_rank)
    parser.set_defaults(device_id=local_rank)  # fairseq-eval-lm sets the device again


def _number_of_ranks(command: str, text: str) -> int:
    """The value of `--distributed-world-size`; under torchrun fairseq is to read 1, since ranks are the plugin's."""
    ranks = int(text)
    if world_size() > 1:
        if ranks not in (1, world_size()):
            raise ArgumentTypeError(f"must be the number of ranks that torchrun started, {world_size()}, got {ranks}")
        return 1
    if ranks <= 1:
        return ranks
    if command not in _SERVED_BY_RANKS:
        raise ArgumentTypeError(f"must be 1, since one process serves {command}, got {ranks}")
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ArgumentTypeError(f"must be 1 under Slurm, where torchrun starts the ranks of each node, got {ranks}")
    if fairseqs_command() != command:
        raise ArgumentTypeError(f"must be 1 where fairseq is called by a program of its own, got {ranks}")
    return ranks


def _start_ranks(command: str, args: Namespace) -> None:
    """Where the user asks for ranks, and the checkpoint serves so many: they take this process's place."""
    if command not in _SERVED_BY_RANKS or world_size() > 1 or args.distributed_world_size <= 1 or not args.path:
        return
    for path in utils.split_paths(args.path):
        check_ranks(with_suffix(path, args), args.distributed_world_size, getattr(args, "expert_placement", None))
    start_ranks(args.distributed_world_size, command, sys.argv[1:])
