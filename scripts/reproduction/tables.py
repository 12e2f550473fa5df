"""Tables as CSV and Markdown, and findings: a sentence of the paper's, and whether the figures bear it out."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from fairseq_moe_ext.atomic_file import new_file


def markdown(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table; None is an empty cell."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |" for cells in lines)


def write_csv(file: Path, rows: Sequence[Any]) -> None:
    """One line per row; rows: dataclasses of one kind, or mappings of the same keys."""
    names = [item.name for item in fields(rows[0])] if is_dataclass(rows[0]) else list(rows[0])
    with new_file(file, text=True) as opened:
        table = csv.DictWriter(opened, names)
        table.writeheader()
        table.writerows(row if isinstance(row, Mapping) else asdict(row) for row in rows)


@dataclass(frozen=True)
class Finding:
    """What the paper says, by which rule our figures are held against it, what they are, and whether they agree.

    holds None: our figures cannot tell.
    """

    says: str
    source: str
    rule: str
    here: str
    holds: bool | None

    def __str__(self) -> str:
        verdict = {True: "Confirmed", False: "Contradicted", None: "Not decided"}[self.holds]
        return f"- **{verdict}**: {self.says} ({self.source}). Here: {self.here}. Rule: {self.rule}."


def findings_section(findings: Sequence[Finding]) -> str:
    return "## The paper's findings\n\n" + "\n".join(map(str, findings))
