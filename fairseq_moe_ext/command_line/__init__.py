"""The command `fairseq-moe`: what one does with one's own model beside fairseq's commands, one file a subcommand.

A subcommand's file is imported when it is asked for: `--help` needs neither PyTorch nor fairseq.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from fairseq_moe_ext import __version__

COMMANDS = {
    "convert": "merge a checkpoint's files into one, split it into rank files, or print what it is",
    "nllb": "NLLB-200 from Hugging Face's layout to one checkpoint for fairseq, or the way back",
    "quantize": "a checkpoint in one file of int8 or int4 experts, from any layout",
    "plan": "what serving a model takes on the device, in main memory and on disk, and the flags to use",
    "balance": "say which rank shall hold which expert, fitted on a trace",
    "prune": "choose the experts that a language or a pair of languages keeps, by a profile",
    "compare": "what a setting costs in quality and gains in bytes and time, beside another of the same model",
    "profile": "merge recorded runs into one profile: which experts every language needs",
    "simulate": "how often an expert buffer of every size would miss, from a trace",
}


def subcommand(name: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a subcommand's file. What fairseq and fairscale say while they are imported is not shown."""
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("fairseq.tasks").setLevel(logging.WARNING)
    return importlib.import_module(f"{__name__}.{name}").main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that `arguments` (default: the process's own) begin with.

    Returns its exit code, 1 where it failed; raises SystemExit, with code 2 where the arguments are wrong.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        return subcommand(name)(rest)
    parser = argparse.ArgumentParser(prog="fairseq-moe", description="Tools for fairseq's Mixture-of-Experts models.")
    parser.epilog = "fairseq-moe COMMAND --help lists a command's options."
    parser.add_argument("--version", action="version", version=f"fairseq_moe_ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command, about in COMMANDS.items():
        commands.add_parser(command, help=about)
    parser.parse_args([name, *rest] if name else [])
    return parser.error("COMMAND must come first")
