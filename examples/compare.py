#!/usr/bin/env python3
"""Print what the examples served, static beside dynamic, as one table: python examples/compare.py FOLDER [FOLDER ...]

A folder holds static.json and dynamic.json (`--moe-report`) beside the commands' outputs: static.log with the
perplexity of a language model, or static.txt with the translations of fairseq-generate.
"""

import json
import re
import sys
from pathlib import Path

import sacrebleu

HEADER = ("model", "gating", "quality", "encoder tok/s", "decoder tok/s", "peak memory", "experts active")


def quality(folder: Path, gating: str) -> str:
    """Perplexity, or BLEU (13a) and chrF, of one served run."""
    translations = folder / f"{gating}.txt"
    if not translations.is_file():
        found = re.search(r"Perplexity: ([\d.]+)", (folder / f"{gating}.log").read_text(encoding="utf-8"))
        if found is None:
            sys.exit(f"compare.py: no perplexity in {folder / gating}.log")
        return f"perplexity {found.group(1)}"
    lines: dict[str, dict[str, str]] = {"T": {}, "H": {}}
    for line in translations.read_text(encoding="utf-8").splitlines():
        kind, _, rest = line.partition("-")
        if kind in lines:
            number, *_, text = rest.split("\t")
            lines[kind][number] = text
    hypotheses = [lines["H"][number] for number in lines["T"]]
    references = [list(lines["T"].values())]
    # the texts are tokens apart by spaces already
    bleu = sacrebleu.corpus_bleu(hypotheses, references, force=True).score
    return f"BLEU {bleu:.2f}, chrF {sacrebleu.corpus_chrf(hypotheses, references).score:.2f}"


def row(folder: Path, gating: str) -> tuple[str, ...]:
    report = json.loads((folder / f"{gating}.json").read_text(encoding="utf-8"))
    layers = report["layers"]
    active = sum(layer["active_experts_mean"] for layer in layers) / len(layers)
    encoder = report.get("encoder")
    return (
        folder.name.replace("_", " "),
        gating,
        quality(folder, gating),
        f"{encoder['tokens_per_second']:,.0f}" if encoder else "",
        f"{report['decoder']['tokens_per_second']:,.0f}",
        f"{report['memory']['peak_rss_bytes'] / 1e6:,.0f} MB",
        f"{active:.1f} of {len(layers[0]['load'])}",
    )


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__.splitlines()[0])
    for name in sys.argv[1:]:
        for gating in ("static", "dynamic"):
            if not (Path(name) / f"{gating}.json").is_file():
                sys.exit(f"compare.py: {name} must hold {gating}.json; run the example in it first")
    rows = [HEADER] + [row(Path(name), gating) for name in sys.argv[1:] for gating in ("static", "dynamic")]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADER))]
    for number, cells in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    main()
