"""The figures of capacity_aware.py: CSV, Markdown tables, and the plot of quality against load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reproduction.paper import beside_paper, paper_figures
from reproduction.plots import panels, save
from reproduction.tables import Finding, findings_section, grouped, markdown, table, unique, write_csv

COLOURS = {"drop": "tab:red", "reroute": "tab:green", "expand": "tab:blue"}
WHY = (
    "Why they differ: the paper's figures are mean accuracies of large language models over tasks, and times of layers "
    "on GPUs; here quality is perplexity, or BLEU and chrF, and the speedup is what the busiest rank's load would give."
)
# a figure of the paper's: model, whether it is a speedup, rule, gamma
_PAPER_KEY = re.compile(r"capacity\.\w+\.(speedup\.)?([a-z-]+)\.([0-9.]+)")
STYLES = {"score": "-", "order": ":", "reverse-order": "-.", "random": "--"}


@dataclass(frozen=True)
class Row:
    """One setting of one model; gamma None: no capacity. Shares are of all assignments that the gate chose.

    largest_expert, largest_rank: load of the busiest, over the mean load without a capacity. layer_ms: milliseconds
    of a layer's call by real ranks, to the end of the last.
    """

    model: str
    gamma: float | None
    overflow: str
    metric: str
    dropped_fraction: float
    dropped: float
    rerouted: float
    largest_expert: float
    largest_rank: float
    layer_ms: float
    perplexity: float | None = None
    bleu: float | None = None
    chrf: float | None = None

    def goodness(self) -> float:
        """The higher the better."""
        return -self.perplexity if self.bleu is None else self.bleu

    @property
    def quality(self) -> str:
        return f"{self.perplexity:.2f}" if self.bleu is None else f"{self.bleu:.1f} / {self.chrf:.1f}"


class Study:
    """One model's rows, the one without a capacity first."""

    def __init__(self, rows: Sequence[Row]):
        self.base, *self.rows = rows
        self.gammas = unique(self.rows, "gamma")
        self.rules = list(dict.fromkeys((row.overflow, row.metric) for row in self.rows))
        self.measure = "perplexity" if self.base.bleu is None else "BLEU / chrF"
        self._at = {(row.overflow, row.metric, row.gamma): row for row in self.rows}

    def row(self, overflow: str, metric: str, gamma: float) -> Row:
        return self._at[overflow, metric, gamma]

    def quality_table(self) -> str:
        """As the paper's Table 1: rules by gammas."""
        head = ("overflow", "who stays", *(f"gamma {gamma:g}" for gamma in self.gammas))
        body = [(*rule, *(self.row(*rule, gamma).quality for gamma in self.gammas)) for rule in self.rules]
        return markdown(head, body)

    def time_table(self, ranks: int) -> str:
        """As the paper's Table 2: what the layer saves, by `score`."""
        rows = [self.base, *(row for gamma in self.gammas for row in self.rows
                             if row.gamma == gamma and row.metric == "score")]
        caption = (
            f"{ranks} ranks. Largest expert, busiest rank: its load in a pass over the mean load without a capacity, "
            "mean over passes and layers. Modelled speedup: of the busiest rank. Measured: a MoE layer's call by "
            f"{ranks} processes over gloo on this machine, until the last has ended, teacher-forced.\n\n"
        )
        return caption + table(
            rows, ("gamma", lambda row: "none" if row.gamma is None else f"{row.gamma:g}"),
            ("overflow", lambda row: "" if row.gamma is None else row.overflow),
            ("dropped fraction", "{.dropped_fraction:.1%}"), ("dropped", "{.dropped:.1%}"),
            ("rerouted", "{.rerouted:.1%}"), ("largest expert", "{.largest_expert:.2f}"),
            ("busiest rank", "{.largest_rank:.2f}"),
            ("modelled speedup", lambda row: f"{self.base.largest_rank / row.largest_rank:.2f}"),
            ("measured ms", "{.layer_ms:.2f}"),
            ("measured speedup", lambda row: f"{self.base.layer_ms / row.layer_ms:.2f}"),
        )

    def findings(self) -> list[Finding]:
        """Whether the paper's order of rules holds here."""
        found, model = [], self.base.model.replace("_", " ")
        for overflow in dict.fromkeys(overflow for overflow, _ in self.rules):
            best = [
                max((row for row in self.rows if (row.overflow, row.gamma) == (overflow, gamma)), key=Row.goodness)
                for gamma in self.gammas
            ]
            times = sum(row.metric == "score" for row in best)
            found.append(Finding(
                f"who stays is best chosen by score ({model}, {overflow})",
                "table of quality",
                "the best metric at every gamma",
                f"at {times} of {len(best)} gammas",
                times == len(best),
            ))
        for other in dict.fromkeys(row.overflow for row in self.rows if row.overflow != "drop"):
            pairs = [(row, self.row("drop", row.metric, row.gamma)) for row in self.rows if row.overflow == other]
            held = sum(row.goodness() >= drop.goodness() for row, drop in pairs)
            found.append(Finding(
                f"a second choice ({other}) is better than to drop ({model})",
                "table of quality",
                "at least as good at equal gamma and metric, in at least nine of ten pairs",
                f"in {held} of {len(pairs)} pairs",
                held >= 0.9 * len(pairs),
            ))
        return found

    def speedup(self, overflow: str, gamma: float) -> float:
        """Modelled, of a layer, by `score`."""
        return self.base.largest_rank / self.row(overflow, "score", gamma).largest_rank

    def has(self, overflow: str, metric: str, gamma: float) -> bool:
        return (overflow, metric, gamma) in self._at

    def draw(self, axes) -> None:
        """Quality against the largest expert's load; a line runs from no capacity to the smallest gamma."""
        for overflow, metric in self.rules:
            points = [self.base, *(self.row(overflow, metric, gamma) for gamma in self.gammas)]
            xs = [row.largest_expert for row in points]
            ys = [row.perplexity if row.bleu is None else row.bleu for row in points]
            faint = {"linewidth": 1.8} if metric == "score" else {"linewidth": 1, "alpha": 0.7}
            label = f"{overflow}, {metric}"
            axes.plot(xs, ys, STYLES[metric], color=COLOURS[overflow], marker="o", markersize=3.5, label=label, **faint)
        axes.plot(self.base.largest_expert, self.base.perplexity if self.base.bleu is None else self.base.bleu, "k*",
                  markersize=12, label="no capacity", zorder=5)
        if self.base.bleu is None:
            axes.invert_yaxis()  # up is better in every panel
        axes.set(title=self.base.model.replace("_", " "), xlabel="largest expert's load / mean load",
                 ylabel="perplexity" if self.base.bleu is None else "BLEU")


def write_figures(folder: Path, rows: Sequence[Row], ranks: int) -> str:
    """Write capacity.csv and capacity.png; returns the Markdown."""
    write_csv(folder / "capacity.csv", rows)
    studies = [Study(of_model) for of_model in grouped(rows, "model").values()]
    parts = []
    for study in studies:
        parts += [
            f"## {study.base.model.replace('_', ' ')}",
            f"{study.measure}; without a capacity {study.base.quality}.",
            study.quality_table(),
            study.time_table(ranks),
        ]
    parts += ["## Beside the paper", beside(studies), WHY]
    parts.append(findings_section([finding for study in studies for finding in study.findings()]))
    plot(folder / "capacity.png", studies)
    return "\n\n".join(parts) + "\n"


def beside(studies: Sequence[Study]) -> str:
    """The paper's tables beside ours: quality in our models' own measures, and the layer's modelled speedup."""
    rows = []
    for key in paper_figures():
        match = _PAPER_KEY.fullmatch(key)
        if match is None:
            continue
        is_speedup, rule, gamma = match.group(1), match.group(2), float(match.group(3))
        overflow, metric = (rule, "score") if rule in COLOURS else ("drop", rule)
        ours = [
            f"{study.speedup(overflow, gamma):.2f}x" if is_speedup else study.row(overflow, metric, gamma).quality
            for study in studies
            if study.has(overflow, metric, gamma)
        ]
        if len(ours) == len(studies):
            rows.append((key, "; ".join(ours)))
    names = "; ".join(f"{study.base.model.replace('_', ' ')} ({study.measure})" for study in studies)
    return f"Ours are of {names}.\n\n{beside_paper(rows)}"


def plot(file: Path, studies: Sequence[Study]) -> None:
    """One panel per model."""
    figure, axes = panels(1, len(studies), width=7.0, height=5.0)
    for study, panel in zip(studies, axes[0], strict=True):
        study.draw(panel)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    save(figure, file)
