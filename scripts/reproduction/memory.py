"""Peak activations and total memory, static against dynamic gating.

    bash scripts/reproduce_memory.sh
    CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_memory.sh --batches 8 32

results/memory/ gets memory.csv, memory.md and memory.png. Activations are the peak of a batch's tensors by PyTorch's
allocations, the model's weights not counted; the total is that and the weights.
Source: "Toward Efficient Inference for Mixture of Experts", memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from reproduction import tables
from reproduction.ladder import Ladder, one_of, waste_sentence
from reproduction.paper import beside_paper
from reproduction.passes import DYNAMIC, GATINGS, STATIC
from reproduction.plots import look, over_batches, panels, save
from reproduction.study import BATCHES, FRACTION, Study, run_study
from reproduction.tables import Finding, findings_section, grouped, write_csv

SECTION = "section on memory"


@dataclass(frozen=True)
class Row:
    """One model at one batch; bytes."""

    model: str
    kind: str  # lm or mt
    batch: int
    parameters: int
    static: int
    dynamic: int

    @property
    def saved(self) -> float:
        """Share of static gating's activations."""
        return 1 - self.dynamic / self.static

    @property
    def total(self) -> float:
        """Static gating's memory over dynamic gating's, the weights counted."""
        return (self.parameters + self.static) / (self.parameters + self.dynamic)


def table(rows: Sequence[Row]) -> str:
    sizes = {"weights": "parameters", "static activations": "static", "dynamic activations": "dynamic"}
    return tables.table(
        rows, ("model", lambda row: row.model.replace("_", " ")), ("batch", "{.batch}"),
        *((f"{head}, MB", lambda row, name=name: f"{getattr(row, name) / 1e6:.1f}") for head, name in sizes.items()),
        ("saved", "{.saved:.1%}"), ("total, static / dynamic", "{.total:.2f}"),
    )


def beside(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(key of the paper's figure, ours), each row at the paper's batch."""
    found = []
    for row in rows:
        found += [
            (f"memory.{row.kind}.static-gb", f"{row.static / 1e9:.3f} GB"),
            (f"memory.{row.kind}.dynamic-gb", f"{row.dynamic / 1e9:.3f} GB"),
            (f"memory.{row.kind}.saved", f"{row.saved:.3f}"),
            (f"memory.{row.kind}.total", f"{row.total:.2f}x"),
        ]
    return found


def findings(rows: Sequence[Row]) -> list[Finding]:
    return [
        Finding(
            f"dynamic gating takes less memory for activations ({row.model.replace('_', ' ')})",
            SECTION,
            "at least a third less, at the paper's batch",
            f"{row.static / 1e6:.1f} MB under static gating, {row.dynamic / 1e6:.1f} under dynamic, {row.saved:.1%} "
            f"less; static gating's grow with the square of the batch's tokens, and the weights beside them are "
            f"{row.parameters / 1e6:.1f} MB, so that the totals differ {row.total:.2f} times",
            row.saved >= 1 / 3,
        )
        for row in rows
    ]


def draw(file, rows: Sequence[Row]) -> None:
    models = grouped(rows, "model")
    figure, axes = panels(1, len(models), width=5.4, height=4.0)
    for panel, (model, of_model) in zip(axes[0], models.items(), strict=True):
        batches = [row.batch for row in of_model]
        for gating in (STATIC, DYNAMIC):
            sizes = [getattr(row, gating) / 1e6 for row in of_model]
            how = look(GATINGS.index(gating))  # one colour in all pictures
            panel.plot(batches, sizes, label=f"{gating}: activations", **how)
            totals = [size + row.parameters / 1e6 for size, row in zip(sizes, of_model, strict=True)]
            panel.plot(batches, totals, linestyle=":", label=f"{gating}: with the weights", **how)
        over_batches(panel, batches, title=model.replace("_", " "), ylabel="MB at the peak")
    save(figure, file)


def make(study: Study) -> str:
    ladders = [(model, Ladder(study, model)) for model in study.models]
    wanted = [(model, ladder, rows) for model, ladder in ladders for rows in study.args.batches or ladder.small]
    rows, at_paper, every = [], [], []
    for model, ladder, batch in (bar := tqdm(wanted, unit="batch")):
        bar.set_description(f"{model.name}, batch {batch}")
        passes = ladder.measure(batch, GATINGS)
        every += passes
        static, dynamic = (one_of(passes, gating=gating) for gating in (STATIC, DYNAMIC))
        kind = "mt" if model.translates else "lm"
        rows.append(Row(model.name, kind, batch, static.parameter_bytes, static.peak_bytes, dynamic.peak_bytes))
        if batch == ladder.base:
            at_paper.append(rows[-1])
    write_csv(study.file(".csv"), rows)
    draw(study.file(".png"), rows)
    parts = [
        "# Memory",
        f"The peak of a batch's tensors; static gating at a capacity fraction of {study.args.capacity_fraction:g}. A "
        "batch is sentences (MT) or blocks (LM).",
        table(rows),
    ]
    if at_paper:
        parts += ["## Beside the paper", beside_paper(beside(at_paper)), waste_sentence(every)]
        parts.append(findings_section(findings(at_paper)))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study("memory", __doc__, make, arguments, [FRACTION, BATCHES])
