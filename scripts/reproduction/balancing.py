"""Max Load and Avg Max Load of every way to place the experts: fitted on half of the batches, tested on the other half.

    bash scripts/reproduce_balancing.sh
    CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_balancing.sh --ranks 8 16

results/balancing/ gets balancing.csv, balancing.md and balancing.png. Every layer is placed on its own; of a stack's
layers the largest Max Load counts, and the mean Avg Max Load.
Source: "Toward Efficient Inference for Mixture of Experts", section on load balancing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tqdm import tqdm

from fairseq_moe_ext.balancing.fit import fit_layers
from fairseq_moe_ext.balancing.solve import METHODS, Demand
from reproduction import tables
from reproduction.models import Model, arguments_of
from reproduction.paper import paper_value
from reproduction.plots import COLOURS, panels, save
from reproduction.runs import Run, identity_of, remembered, run
from reproduction.stacks import DECODER, ENCODER, LM, papers_method, stacks_of
from reproduction.study import BATCH_SIZE, Option, Study, run_study
from reproduction.tables import Finding, findings_section, unique, write_csv

PAPERS_RANKS = 8


@dataclass(frozen=True)
class Row:
    """One stack on so many ranks by one method; loads are shares of a batch's assignments, on either half.

    bound: no placement's Avg Max Load falls below it on the fitted half. batches: of both halves.
    """

    model: str
    stack: str
    kind: str
    ranks: int
    batch: int
    batches: int
    method: str
    fitted_max: float
    fitted_avg: float
    held_out_max: float
    held_out_avg: float
    bound: float


def fit(model: Model, found: Run, ranks: int, batch: int, time_limit: float) -> list[dict]:
    """The rows of one model's stacks that have as many experts as ranks, as dicts."""
    rows, layers = [], {}
    stacks = [stack for stack in stacks_of(model, found.trace) if stack.num_experts >= ranks]
    if stacks:
        layers = {layer.name: layer for layer in fit_layers(found.trace, Demand(ranks, time_limit=time_limit))}
    for stack in stacks:
        of_stack = [layers[name] for name in stack.steps]
        for method in METHODS:
            fits = [layer.methods[method] for layer in of_stack]
            halves = [[each.fitted for each in fits], [each.held_out for each in fits]]
            loads = [
                (max(each.max_load for each in half), sum(each.avg_max_load for each in half) / len(half))
                for half in halves
            ]
            batches = len(of_stack[0].fitted) + len(of_stack[0].held_out)
            bound = sum(layer.bound for layer in of_stack) / len(of_stack)
            rows.append(asdict(Row(
                model.name, stack.title, stack.kind, ranks, batch, batches, method, *loads[0], *loads[1], bound
            )))
    return rows


def findings(rows: Sequence[Row]) -> list[Finding]:
    found, source = [], "section on load balancing"
    at = {(row.stack, row.ranks, row.method): row for row in rows}
    most = max(row.ranks for row in rows)
    ranks = PAPERS_RANKS if any(row.ranks == PAPERS_RANKS for row in rows) else most
    stacks = {row.stack: row.kind for row in rows if row.ranks == ranks}
    before, after = paper_value("balancing.lm.contiguous"), paper_value("balancing.lm.balanced")
    for stack in (name for name, kind in stacks.items() if kind == LM):
        even, greedy = (at[stack, ranks, method] for method in ("contiguous", "greedy"))
        found.append(Finding(
            f"without balancing the LM's Max Load is above {before}, with it below {after}", source,
            f"both on the held-out half, {ranks} ranks",
            f"{even.held_out_max:.2f} contiguous, {greedy.held_out_max:.2f} greedy, {1 / ranks:.2f} is even ({stack})",
            even.held_out_max > before and greedy.held_out_max < after,
        ))
    for stack, kind in stacks.items():
        even, ours = (at[stack, ranks, method] for method in ("contiguous", papers_method(kind)))
        found.append(Finding(
            f"balanced placement lowers the busiest rank's load ({kind})", source,
            f"Avg Max Load on the held-out half, {ranks} ranks, {ours.method} below contiguous",
            f"{even.held_out_avg:.1%} contiguous, {ours.held_out_avg:.1%} {ours.method} ({stack})",
            ours.held_out_avg < even.held_out_avg,
        ))
        if kind == DECODER:
            greedy = at[stack, ranks, "greedy"]
            found.append(Finding(
                "for the MT decoder anti-correlation is the better method", source,
                f"its Avg Max Load on the held-out half below greedy's, {ranks} ranks",
                f"{ours.held_out_avg:.1%}, greedy {greedy.held_out_avg:.1%} ({stack})",
                ours.held_out_avg < greedy.held_out_avg,
            ))
    return found


def table(rows: Sequence[Row]) -> str:
    """Avg Max Load and Max Load, both halves, and how far the fitted Avg Max Load lies above the bound."""
    return tables.table(
        rows, ("stack", "{.stack}"), ("ranks", "{.ranks}"), ("even", lambda row: f"{1 / row.ranks:.1%}"),
        ("method", "{.method}"), ("Avg Max Load, fitted", "{.fitted_avg:.1%}"), ("held out", "{.held_out_avg:.1%}"),
        ("Max Load, fitted", "{.fitted_max:.1%}"), ("held out", "{.held_out_max:.1%}"),
        ("above the bound", lambda row: f"{row.fitted_avg / row.bound - 1:.1%}"),
    )


def draw(file, rows: Sequence[Row]) -> None:
    """Held-out Avg Max Load over the even share, as bars; Max Load as ticks; one panel per stack."""
    stacks, ranks = unique(rows, "stack"), unique(rows, "ranks")
    figure, (row_of_panels,) = panels(1, len(stacks), width=4.6, height=4.4, sharey=True)
    width = 0.8 / len(METHODS)
    for panel, stack in zip(row_of_panels, stacks, strict=True):
        for number, method in enumerate(METHODS):
            of_method = {row.ranks: row for row in rows if row.stack == stack and row.method == method}
            at = [place + (number - (len(METHODS) - 1) / 2) * width for place, r in enumerate(ranks) if r in of_method]
            means, peaks = (
                [getattr(row, name) * row.ranks for row in of_method.values()]
                for name in ("held_out_avg", "held_out_max")
            )
            panel.bar(at, means, width * 0.92, color=COLOURS[number % len(COLOURS)], label=method)
            panel.plot(at, peaks, "k_", markersize=9, label="Max Load" if method == METHODS[-1] else None)
        panel.axhline(1, color="black", linestyle=":", linewidth=1)
        panel.set(title=stack, xticks=range(len(ranks)), xticklabels=ranks, xlabel="ranks")
        panel.grid(False, axis="x")
    row_of_panels[0].set_ylabel("busiest rank's load / even share\n(held out; bars: Avg Max Load)")
    figure.legend(*row_of_panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=9)
    save(figure, file)


def make(study: Study) -> str:
    args, rows = study.args, []
    wanted = [(model, ranks) for model in study.models for ranks in args.ranks]
    for model, ranks in (bar := tqdm(wanted, unit="fit")):
        bar.set_description(f"{model.name} on {ranks} ranks")
        batch = args.batch_size or model.few_rows
        found = run(study.runs, model, args.subset, rows=batch)
        arguments = [*arguments_of(model, args.subset, batch), f"{args.time_limit:g} s"]
        rows += remembered(
            study.output / "fits" / f"{model.name}-{ranks}.json",
            identity_of(model, arguments, ranks),
            lambda model=model, ranks=ranks, batch=batch, found=found: fit(model, found, ranks, batch, args.time_limit),
        )
    if not rows:
        raise ValueError(f"--ranks must be at most the experts of a layer, got {min(args.ranks)}")
    rows = sorted((Row(**row) for row in rows), key=lambda row: ((LM, ENCODER, DECODER).index(row.kind), row.stack))
    write_csv(study.file(".csv"), rows)
    draw(study.file(".png"), rows)
    batches = ", ".join(
        f"{row.stack} {row.batches} batches of {row.batch}" for row in {row.stack: row for row in rows}.values()
    )
    parts = [
        "# Load balancing",
        "The busiest rank's share of a batch's assignments: Max Load in any batch, Avg Max Load the mean over batches. "
        f"Placements are fitted on the first half of the batches and tested on the other: {batches}. fairseq sorts "
        "sentences by length, so that the halves of a translation differ more than two days of traffic would. "
        f"local-search and exact have {args.time_limit:g} s a layer each; no method is less even on the fitted half "
        "than contiguous, whose placement it takes then.",
        table(rows),
        findings_section(findings(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    ranks = Option("ranks", "2 4 8", [2, 4, 8], many=True, metavar="R", least=2)
    limit = Option("time-limit", "seconds per layer and search (2)", 2.0, float, metavar="S", above=0)
    return run_study("balancing", __doc__, make, arguments, [ranks, BATCH_SIZE, limit])
