"""Options of NLLB's branch of fairseq that the release lacks and that serving has no use for: accepted, and without
effect, so that NLLB's published commands run as they are written.

Source: `add_args` of `fairseq/tasks/translation_multi_simple_epoch.py` and of
`fairseq/data/multilingual/multilingual_data_manager.py` of upstream's branch `nllb`.
"""

from __future__ import annotations

from argparse import ArgumentParser

SWITCHES = (
    *("--one-dataset-per-batch", "--pad-to-fixed-length", "--use-local-shard-size", "--enable-m2m-validation"),
    *("--ignore-mmt-main-data",),
)
VALUES = (
    *("--tokens-per-sample", "--sample-break-mode", "--mask", "--mask-random", "--insert", "--permute", "--rotate"),
    *("--poisson-lambda", "--permute-sentences", "--mask-length", "--replace-length"),
    *("--mixed-multitask-denoising-prob", "--eval-lang-pairs"),
)
FIELDS = tuple(option.removeprefix("--").replace("-", "_") for option in (*SWITCHES, *VALUES))
_HELP = "of NLLB's training; accepted for the sake of its scripts, without effect"


def accept_nllb_options(parser: ArgumentParser) -> None:
    """Add those that the parser does not have."""
    for option in SWITCHES:
        if option not in parser._option_string_actions:
            parser.add_argument(option, action="store_true", help=_HELP)
    for option in VALUES:
        if option not in parser._option_string_actions:
            parser.add_argument(option, help=_HELP)
