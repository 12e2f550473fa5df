"""An expert buffer of every size: miss rate by policy and placement, and what it saves and costs when served.

    bash scripts/reproduce_buffering.sh
    CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_buffering.sh --ranks 8

results/buffering/ gets buffering.md and three tables with a picture each: buffering.csv, miss rates simulated on a
recorded routing; buffering-ranks.csv, the same on several ranks under contiguous and balanced placement; and
buffering-served.csv, runs with --expert-buffer-size.
Source: "Toward Efficient Inference for Mixture of Experts", section on expert buffering.
"""

from __future__ import annotations

import sys
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
from reproduction.study import Study, positive, run_study, study_parser
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
    parser = study_parser("buffering", __doc__)
    parser.add_argument("--batch-size", type=positive, metavar="N", help="sentences, or blocks (8; LM: 2)")
    parser.add_argument("--ranks", type=int, default=4, metavar="R", help="ranks of the simulated placements (4)")
    shares = [0.75, 0.5, 0.25, 0.125]
    parser.add_argument("--shares", type=float, nargs="+", default=shares, metavar="S",
                        help="served buffer sizes, as shares of a layer's experts (0.75 0.5 0.25 0.125)")
    args = parser.parse_args(arguments)
    if args.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {args.ranks}")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if not 0 < min(args.shares) <= max(args.shares) < 1:
        parser.error(f"--shares must be above 0 and below 1, got {' '.join(f'{each:g}' for each in args.shares)}")
    return run_study(parser, arguments, make)


if __name__ == "__main__":
    sys.exit(main())
