"""The papers' own figures, all of which lie in paper.json with their source, and ours beside them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reproduction.tables import markdown


@dataclass(frozen=True)
class PaperFigure:
    """One figure of a paper. value: a number, a text, or a list; place: table or section; paper: its title."""

    value: Any
    unit: str
    what: str
    place: str
    paper: str

    def __str__(self) -> str:
        unit = self.unit if self.unit in ("", "x", "%") else f" {self.unit}"
        return f"{format_number(self.value)}{unit}"


@functools.cache
def paper_figures() -> Mapping[str, PaperFigure]:
    """Every figure by its key, such as `throughput.lm.over-static`."""
    content = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
    papers = content["papers"]
    found = {key: PaperFigure(**{**each, "paper": papers[each["paper"]]}) for key, each in content["figures"].items()}
    return MappingProxyType(found)


def paper_value(key: str) -> Any:
    """The bare value of a figure; KeyError where the papers' file has none of that key."""
    return paper_figures()[key].value


def format_number(value: Any) -> str:
    """Short and readable: 54.5B, 355M, 4,096, 0.05; texts as they are.

    >>> format_number(54.5e9), format_number(355e6), format_number(51200), format_number(0.322)
    ('54.5B', '355M', '51,200', '0.322')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def beside_paper(rows: Sequence[tuple[str, Any]]) -> str:
    """A Markdown table of (key of a figure, ours, as a text or a number): what it is, the paper's, ours, the source."""
    body = []
    for key, ours in rows:
        figure = paper_figures()[key]
        body.append((figure.what, str(figure), format_number(ours), f"{figure.paper}, {figure.place}"))
    return markdown(("figure", "paper", "here", "source"), body)
