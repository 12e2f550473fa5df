"""One style for all pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fairseq_moe_ext.atomic_file import new_file

# told apart by colour-blind readers (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "viridis"


BATCH = "batch (sentences; LM: blocks)"


def look(number: int) -> dict[str, str]:
    """Colour and marker of a picture's curve of this number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def over_batches(panel, batches: Iterable[int], **how) -> None:
    """A panel's finish: batches along x and both axes logarithmic; `how`: of Axes.set."""
    ticks = sorted(set(batches))
    panel.set(xscale="log", yscale="log", xlabel=BATCH, **how)
    panel.set_xticks(ticks, labels=map(str, ticks), fontsize=8)
    panel.xaxis.set_ticks([], minor=True)
    panel.legend(fontsize=8)


def panels(rows: int, columns: int, width: float = 5.0, height: float = 3.8, **how):
    """(figure, its axes as an array (rows, columns)); inches of one panel; `how`: of Figure.subplots."""
    from matplotlib.figure import Figure  # heavy: only where a picture is asked for

    figure = Figure(figsize=(width * columns + 0.4, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **how)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, file: Path) -> None:
    """A figure of `panels` as PNG."""
    with new_file(file) as opened:
        figure.savefig(opened, dpi=120, format="png")
