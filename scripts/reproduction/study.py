"""What the scripts share: their options, the folders they write, and how they end."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fairseq_moe_ext.atomic_file import WriteError, write_text
from reproduction.models import ROOT, Model, add_model_arguments, find_models
from reproduction.runs import RunError


@dataclass(frozen=True)
class Study:
    """One script's run. output: where its CSV, Markdown and PNG go; runs: all scripts' finished runs."""

    name: str
    args: argparse.Namespace
    models: list[Model]
    output: Path
    runs: Path

    def file(self, ending: str) -> Path:
        """`<output>/<name><ending>`; ending: `.csv`, `.md`, `.png`, or `-more.png`."""
        return self.output / f"{self.name}{ending}"


def positive(text: str) -> int:
    """An option's value: 0 must not pass for what was left out."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def study_parser(name: str, doc: str, models: bool = True) -> argparse.ArgumentParser:
    """The options that every script has; models False: of a script that serves none."""
    parser = argparse.ArgumentParser(
        prog=f"reproduce_{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if models:
        add_model_arguments(parser)
    results = ROOT / "results"
    parser.add_argument("--results", type=Path, default=results, help=f"folder for {name}/ and runs/ (results/)")
    return parser


def run_study(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, make: Callable[[Study], str], models: bool = True
) -> int:
    """Parse, find the models, and let `make` write its files and return its Markdown, which is written and printed.

    Ends with 2 and one line where the options are wrong, or where `make` raises a ValueError, RunError or
    WriteError.
    """
    name = parser.prog.removeprefix("reproduce_")
    args = parser.parse_args(arguments)
    found = find_models(args, parser) if models else []
    output = args.results / name
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # fairseq's lines would tear the progress bar
    warnings.simplefilter("ignore")
    output.mkdir(parents=True, exist_ok=True)
    study = Study(name, args, found, output, args.results / "runs")
    try:
        text = make(study)
    except (RunError, ValueError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(study.file(".md"), text)
    print(text)
    print(f"{', '.join(sorted(file.name for file in output.iterdir() if file.is_file()))} are in {output}")
    return 0
