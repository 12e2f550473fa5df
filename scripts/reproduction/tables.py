"""Tables as CSV and Markdown, and findings: a sentence of the paper's, and whether the figures bear it out."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from tabulate import DataRow, TableFormat, tabulate

from fairseq_moe_ext.atomic_file import new_file

# as narrow as can be: a page's tables have lines of hundreds of characters
_CELLS = DataRow("|", "|", "|")
_NARROW = TableFormat(None, lambda widths, _: "|" + " --- |" * len(widths), None, None, _CELLS, _CELLS, 1, None)


def markdown(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table; None is an empty cell."""
    return tabulate(body, head, _NARROW, stralign=None, numalign=None, disable_numparse=True)


def table(rows: Sequence[Any], *columns: tuple[str, str | Callable[[Any], Any]]) -> str:
    """A table of (head, cell): the row put into a format string, as "{.ms:.1f}", or what a function makes of it."""
    body = [[how(row) if callable(how) else how.format(row) for _, how in columns] for row in rows]
    return markdown([head for head, _ in columns], body)


def unique(rows: Sequence[Any], name: str) -> list:
    """The values of one field, in the order of the rows."""
    return list(dict.fromkeys(getattr(row, name) for row in rows))


def grouped(rows: Sequence[Any], *names: str) -> dict:
    """The value of a field, or of several a tuple, -> its rows."""
    found: dict = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in names)
        found.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return found


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
