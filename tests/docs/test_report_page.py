"""docs/report.md against a report and a trace that a command wrote: every field of them stands in the page."""

import json
import re
from collections.abc import Iterator

import numpy as np
import option_runs
import pytest
from doc_pages import REPOSITORY

from fairseq_moe_ext.tasks.refused_options import GENERATE, MT

PAGE = REPOSITORY / "docs" / "report.md"
# parts of them depend on the run: one rank has no exchange, and not every flag was given
ONLY_SOMETIMES = {"layers.load_per_rank", "layers.weight_error", "layers.kept_experts", "layers.first_choice_shares"}
ONLY_SOMETIMES |= {"ranks.rounds", "ranks.idle_rounds"}
OPEN = ("layers.seconds",)  # parts, which the page lists in words


def fields_of_page() -> set[str]:
    """Dotted names of the tables' first column; the second and third table are of `layers` and `ranks`."""
    found: set[str] = set()
    prefixes = iter(("", "layers.", "ranks."))
    text = PAGE.read_text(encoding="utf-8")
    for line in text[: text.index("## The trace")].splitlines():
        if line.startswith("| field |"):
            prefix = next(prefixes)
        elif match := re.match(r"\| (`.*?) \| ", line):
            names = re.findall(r"`([\w.]+)`", match.group(1))
            group = names[0].rpartition(".")[0]
            found |= {prefix + (group + name if name.startswith(".") else name) for name in names}
    return found


def fields_of(node: dict, prefix: str = "") -> Iterator[str]:
    for name, item in node.items():
        name = prefix + name
        if isinstance(item, dict) and name not in OPEN:
            yield from fields_of(item, f"{name}.")
        else:
            yield name
        if isinstance(item, list) and item and isinstance(item[0], dict):
            yield from fields_of(item[0], f"{name}.")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(report, trace) of a run with a buffer and a capacity."""
    folder = option_runs.make_models(tmp_path_factory.mktemp("models"))[MT]
    buffer, capacity = ("--expert-buffer-size", 2), ("--moe-capacity-factor", 1.0, "--moe-overflow", "reroute")
    flags = (*buffer, "--expert-store", "disk", *capacity)
    said = option_runs.run(folder, GENERATE, MT, *flags, "--moe-trace", folder / "trace.npz")
    assert "Error" not in said, said
    return json.loads((folder / "report.json").read_text()), folder / "trace.npz"


def test_the_page_has_the_reports_fields_and_no_others(written):
    report, _ = written
    assert fields_of_page() == {*fields_of(report)} | ONLY_SOMETIMES


def test_the_page_names_the_parts_of_a_layers_seconds(written):
    report, _ = written
    parts = set().union(*(layer["seconds"] for layer in report["layers"]))
    assert {"gate", "capacity", "copy"} <= parts
    text = PAGE.read_text(encoding="utf-8")
    assert not [part for part in parts if f"`{part}`" not in text]


def test_the_page_has_the_traces_arrays(written):
    with np.load(written[1]) as arrays:
        found = {re.sub(r"^(encoder|prefill|decode)_", "<phase>_", name) for name in arrays}
    named = re.findall(r"^\| `(<phase>_\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found == set(named)
