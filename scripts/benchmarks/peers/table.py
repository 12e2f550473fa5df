"""The figures of a run as rows, as Markdown and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

from peers.environments import TRANSFORMERS_MIXTRAL, TRANSFORMERS_NLLB

from fairseq_moe_ext.atomic_file import write_json, write_text
from reproduction import tables
from reproduction.report import cpu_name

OURS = ("our_layer.py", "ours, dynamic")
FLOOR = ("dense", "weights")


def layer_rows(answers: dict[str, dict], taken: dict[tuple[str, str], list[float]]) -> list[dict]:
    """answers: what each peer prepared. taken: seconds by (script, call), in rounds that began together."""
    rows = []
    for (script, name), seconds in taken.items():
        if name in FLOOR:
            continue
        row = {"implementation": name, "ms": 1000 * statistics.median(seconds), "calls": len(seconds)}
        row["times_ours"] = ratio(seconds, taken[OURS])
        own = script if (script, FLOOR[0]) in taken else OURS[0]  # fairscale computes what ours does
        floor = [sum(parts) for parts in zip(*(taken[own, part] for part in FLOOR), strict=False)]
        row |= {"floor_ms": 1000 * statistics.median(floor), "times_floor": ratio(seconds, floor)}
        rows.append({**row, **answers[script]["facts"]})
    for answer in answers.values():
        rows += [{"implementation": name, "left_out": why} for name, why in answer["left_out"].items()]
    return rows


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median over rounds: what slows the machine for a while slows both."""
    return statistics.median(one / other for one, other in zip(seconds, base, strict=False))


def machine(threads: int) -> dict:
    versions = {name: version(name) for name in ("torch", "fairscale", "fairseq-fixed")}
    versions |= {"transformers (Mixtral)": TRANSFORMERS_MIXTRAL, "transformers (NLLB-MoE)": TRANSFORMERS_NLLB}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


def write_tables(folder: Path, content: dict) -> str:
    """Write peers.json and peers.md into `folder`; returns the latter."""
    text = markdown(content)
    write_json(folder / "peers.json", content)
    write_text(folder / "peers.md", text)
    return text


def markdown(content: dict) -> str:
    here = content["machine"]
    lines = [
        f"{here['cpu']}, {here['threads']} of {here['cores']} cores, float32; Python {here['python']}, "
        + ", ".join(f"{name} {number}" for name, number in here["versions"].items()),
        "",
    ]
    table = []
    for result in content["layers"]:
        size = result["size"]
        for row in result["rows"]:
            hidden_dim = row.get("hidden_dim", size["hidden_dim"])
            dims = (f"{size['tokens']:,}", size["experts"], size["model_dim"], f"{hidden_dim:,}")
            start = (*dims, row["implementation"])
            if "left_out" in row:
                table.append((*start, f"left out: {row['left_out']}", *[None] * 4))
            else:
                numbers = ("{ms:.1f}", "{times_ours:.2f}", "{floor_ms:.1f}", "{times_floor:.2f}", "{calls}")
                table.append((*start, *(number.format(**row) for number in numbers)))
    head = (*"TEDF", "implementation", "ms", "times ours", "its own floor, ms", "times its own floor", "calls")
    lines.append(tables.markdown(head, table))
    if content.get("translation"):
        lines += ["", *_translation(content["translation"])]
    return "\n".join(lines) + "\n"


def _translation(found: dict) -> list[str]:
    if "left_out" in found:
        return [f"Translation: left out: {found['left_out']}"]
    words = (
        "Translation: {sentences} sentences of mixed lengths in batches of {batch}, beam {beam}, {tokens} tokens and "
        "the end each; {same_token_ids} of {sentences} best hypotheses have the same token ids, {different_hypotheses} "
        "differ from each other."
    )
    found_table = tables.table(
        found["rows"], ("translation", "{[implementation]}"), ("seconds", "{[seconds]:.2f}"),
        ("tokens/s", "{[tokens_per_second]:.0f}"), ("times ours", "{[times_ours]:.2f}"), ("calls", "{[calls]}"),
    )
    return [words.format(**found), "", found_table]
