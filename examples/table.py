#!/usr/bin/env python3
"""Print what the examples served, static beside dynamic gating, as one table.

    python examples/table.py examples/output/language_modeling examples/output/translation

A FOLDER holds static.json and dynamic.json (`--moe-report`) beside the commands' outputs: static.log with the
perplexity of a language model, or static.txt with the translations of fairseq-generate; the same of dynamic.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_moe_ext.command_line.parsing import failed  # noqa: E402
from fairseq_moe_ext.command_line.translations import translation_quality  # noqa: E402

HEADER = ("model", "gating", "quality", "encoder tok/s", "decoder tok/s", "peak memory", "experts active")
GATINGS = ("static", "dynamic")


def quality(folder: Path, gating: str) -> str:
    """Perplexity, or BLEU (13a) and chrF, of one served run."""
    translations, log = folder / f"{gating}.txt", folder / f"{gating}.log"
    if translations.is_file():
        try:
            found = translation_quality(translations.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{translations} must be the output of fairseq-generate: {error}") from None
        return f"BLEU {found['bleu']:.2f}, chrF {found['chrf']:.2f}"
    match = re.search(r"Perplexity: ([\d.]+)", log.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{log} must be the output of fairseq-eval-lm, and there is no perplexity in it")
    return f"perplexity {match.group(1)}"


def row(folder: Path, gating: str) -> tuple[str, ...]:
    """The table's row of `<gating>.json` in the folder."""
    file = folder / f"{gating}.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        layers, encoder = report["layers"], report.get("encoder")
        active = sum(layer["active_experts_mean"] for layer in layers) / max(len(layers), 1)
        speeds = (encoder and encoder["tokens_per_second"], report["decoder"]["tokens_per_second"])
        memory, experts = report["memory"]["peak_rss_bytes"], len(layers[0]["load"]) if layers else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} must be what --moe-report wrote") from None
    return (
        folder.name.replace("_", " "),
        gating,
        quality(folder, gating),
        *("" if speed is None else f"{speed:,.0f}" for speed in speeds),
        f"{memory / 1e6:,.0f} MB",
        f"{active:.1f} of {experts}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The table of these folders (default: of the process's arguments); returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path)
    args = parser.parse_args(arguments)
    for folder in args.folders:
        for gating in GATINGS:
            if not (folder / f"{gating}.json").is_file():
                return failed(f"{folder} must hold {gating}.json; serve the model so with --moe-report first")
    try:
        rows = [row(folder, gating) for folder in args.folders for gating in GATINGS]
    except (ValueError, OSError) as error:
        return failed(error)
    print(tabulate(rows, HEADER, tablefmt="github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
