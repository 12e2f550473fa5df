"""One style for all pictures."""

from __future__ import annotations

from pathlib import Path

from fairseq_moe_ext.atomic_file import new_file

# told apart by colour-blind readers (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "viridis"


def panels(rows: int, columns: int, width: float = 5.0, height: float = 3.8, **how):
    """(figure, its axes as an array (rows, columns)); inches of one panel; `how`: of Figure.subplots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy: only where a picture is asked for
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.4, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **how)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, file: Path) -> None:
    """A figure of `panels` as PNG."""
    with new_file(file) as opened:
        figure.savefig(opened, dpi=120, format="png")
