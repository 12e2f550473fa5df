"""What the scripts share: their options, the folders they write, and how they end."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq_moe_ext.atomic_file import WriteError, write_text
from fairseq_moe_ext.command_line.parsing import positive
from reproduction.models import ROOT, Model, add_model_arguments, find_models
from reproduction.runs import RunError


@dataclass(frozen=True)
class Study:
    """One script's run. output: where its CSV, Markdown and PNG go; runs: finished runs, of all scripts."""

    name: str
    args: argparse.Namespace
    models: list[Model]
    output: Path
    runs: Path

    def file(self, ending: str) -> Path:
        """`<output>/<name><ending>`; ending: `.csv`, `.md`, `.png`, or `-more.png`."""
        return self.output / f"{self.name}{ending}"


@dataclass(frozen=True)
class Option:
    """`--flag`, a number, or where `many` one or more; of kind bool `--no-flag`. `check` refuses what breaks a rule."""

    flag: str
    help: str
    default: Any = None
    kind: Callable[[str], Any] = int
    many: bool = False
    metavar: str = "N"
    least: float | None = None
    above: float | None = None
    below: float | None = None
    unit: str = ""

    @property
    def rule(self) -> str:
        bounds = (("at least", self.least), ("above", self.above), ("below", self.below))
        return " and ".join(f"{words} {bound}{self.unit}" for words, bound in bounds if bound is not None)

    def add(self, parser: argparse.ArgumentParser) -> None:
        if self.kind is bool:
            parser.add_argument(f"--no-{self.flag}", dest=self.flag, action="store_false", help=self.help)
            return
        how = {"nargs": "+"} if self.many else {}
        parser.add_argument(
            f"--{self.flag}", type=self.kind, default=self.default, metavar=self.metavar, help=self.help, **how
        )

    def check(self, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
        value = getattr(args, self.flag.replace("-", "_"))
        for each in value if isinstance(value, Sequence) else [] if value is None else [value]:
            too_small = self.least is not None and each < self.least or self.above is not None and not each > self.above
            if too_small or self.below is not None and not each < self.below:
                parser.error(f"--{self.flag} must be {self.rule}, got {each:g}")


BATCHES = Option("batches", "batch sizes (up to the paper's)", many=True, least=1)
BATCH_SIZE = Option("batch-size", "sentences, or blocks (8; LM: 2)", kind=positive)
# static gating's, of all scripts that have it
FRACTION = Option("capacity-fraction", "static gating's slots per expert over the batch's tokens (1: nothing drops)",
                  1.0, float, metavar="F")


def run_study(
    name: str, doc: str | None, make: Callable[[Study], str], arguments: Sequence[str] | None,
    options: Sequence[Option] = (), models: bool | None = True, stem: str | None = None,
) -> int:
    """Parse, find the models, and let `make` write its files and return its Markdown, which is written and printed.

    models None: only where the options name one. stem: the files' name where --output, not --results, is the folder.
    Ends with 2 and one line where the options are wrong, or where `make` raises a ValueError, RunError or
    WriteError.
    """
    parser = argparse.ArgumentParser(
        prog=f"reproduce_{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    for option in options:
        option.add(parser)
    results = ROOT / "results"
    if stem:
        parser.add_argument("--output", type=Path, default=results / name, help="folder")
    else:
        parser.add_argument("--results", type=Path, default=results, help=f"folder for {name}/ and runs/ (results/)")
    args = parser.parse_args(arguments)
    for option in options:
        option.check(args, parser)
    wanted = models or models is None and (args.checkpoint or args.data)
    found = find_models(args, parser) if wanted else []
    output = args.output if stem else args.results / name
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # fairseq's lines would tear the progress bar
    warnings.simplefilter("ignore")
    output.mkdir(parents=True, exist_ok=True)
    study = Study(stem or name, args, found, output, (output if stem else args.results) / "runs")
    try:
        text = make(study)
    except (RunError, ValueError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(study.file(".md"), text)
    print(text)
    print(f"{', '.join(sorted(file.name for file in output.iterdir() if file.is_file()))} are in {output}")
    return 0
