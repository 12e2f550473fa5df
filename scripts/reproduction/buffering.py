"""An expert buffer of every size: miss rate by policy and placement, and what it saves and costs when served.

    bash scripts/reproduce_buffering.sh
    CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_buffering.sh --ranks 8

results/buffering/ gets buffering.md and three tables with a picture each: buffering.csv, miss rates simulated on a
recorded routing; buffering-ranks.csv, the same on several ranks under contiguous and balanced placement; and
buffering-served.csv, runs with --expert-buffer-size.
Source: "Toward Efficient Inference for Mixture of Experts", section on expert buffering.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from reproduction.buffer_findings import findings
from reproduction.buffer_plots import draw_misses, draw_ranks, draw_served
from reproduction.buffer_served import ServedRow, serve_sizes, served_table
from reproduction.buffer_simulated import (
    SimulatedRow,
    misses_table,
    ranks_table,
    simulate_one_rank,
    simulate_ranks,
)
from reproduction.models import arguments_of
from reproduction.runs import identity_of, remembered, run
from reproduction.study import BATCH_SIZE, Option, Study, run_study
from reproduction.tables import findings_section, write_csv


def make(study: Study) -> str:
    args = study.args
    alone: list[SimulatedRow] = []
    shared: list[SimulatedRow] = []
    served: list[ServedRow] = []
    with tqdm(total=len(study.models) * (3 + 1 + len(args.shares)), unit="run") as bar:
        for model in study.models:
            batch = args.batch_size or model.few_rows
            bar.set_description(f"{model.name}, recording")
            found = run(study.runs, model, args.subset, rows=batch)
            bar.update()
            for rows, ranks, simulate in ((alone, 1, simulate_one_rank), (shared, args.ranks, simulate_ranks)):
                bar.set_description(f"{model.name}, simulating {ranks} ranks")
                known = remembered(
                    study.output / "simulated" / f"{model.name}-{ranks}.json",
                    identity_of(model, arguments_of(model, args.subset, batch), ranks),
                    lambda model=model, found=found, batch=batch, simulate=simulate: simulate(
                        model, found.trace, batch, args.ranks
                    ),
                )
                rows += [SimulatedRow(**row) for row in known]
                bar.update()
            served += serve_sizes(study, model, batch, args.shares, bar)
    tables = (("", alone, draw_misses), ("-ranks", shared, draw_ranks), ("-served", served, draw_served))
    for ending, rows, draw in tables:
        if rows:
            write_csv(study.file(f"{ending}.csv"), rows)
            draw(study.file(f"{ending}.png"), rows)
    parts = ["# Expert buffering", "## Miss rates", misses_table(alone)]
    if shared:
        parts += [f"## On {args.ranks} ranks", ranks_table(shared)]
    parts += ["## Served", served_table(served), findings_section(findings(alone, shared, served))]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    ranks = Option("ranks", "ranks of the simulated placements (4)", 4, metavar="R", least=2)
    shares = Option("shares", "served buffer sizes, as shares of a layer's experts (0.75 0.5 0.25 0.125)",
                    [0.75, 0.5, 0.25, 0.125], float, many=True, metavar="S", above=0, below=1)
    return run_study("buffering", __doc__, make, arguments, [BATCH_SIZE, ranks, shares])
