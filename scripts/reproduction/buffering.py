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
from pathlib import Path

from tqdm import tqdm

from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY, ORDERS
from fairseq_moe_ext.buffering.simulation import MIN
from reproduction.buffer_rows import (
    PAPERS_ORDER,
    PLACEMENTS,
    RULES,
    ServedRow,
    SimulatedRow,
    serve_sizes,
    simulate_one_rank,
    simulate_ranks,
    whole_rows,
)
from reproduction.models import arguments_of
from reproduction.paper import paper_value
from reproduction.plots import look, panels, save
from reproduction.runs import identity_of, remembered, run
from reproduction.study import BATCH_SIZE, Option, Study, run_study
from reproduction.tables import Finding, findings_section, grouped, markdown, table, unique, write_csv

SOURCE = "section on expert buffering"
FEWER = 0.01  # less is no difference
CLOSE = 1.1  # LIFO is close to MIN with at most so many times its misses
LOOKS = {rule: look(number) for number, rule in enumerate(RULES)}
LOOKS[MIN] = {"color": "black", "marker": "", "linestyle": "--"}


def misses_table(rows: Sequence[SimulatedRow]) -> str:
    """Miss rates at a quarter and at half of the experts."""
    at = {(row.stack, row.size, row.order, row.policy): row for row in rows}
    body = []
    for stack, of_stack in grouped(rows, "stack").items():
        experts, sizes = of_stack[0].experts, sorted(unique(of_stack, "size"))
        for share in (0.25, 0.5):
            size = min(sizes, key=lambda each, wanted=share * experts: abs(each - wanted))
            for order in reversed(ORDERS):
                rates = [f"{at[stack, size, order, policy].miss_rate:.1%}" for policy in RULES]
                body.append((stack, of_stack[0].batch, f"{size} of {experts}", order, *rates))
    intro = (
        "Misses over accesses, simulated on a recorded routing (a served run has the same, below); `ascending` is the "
        "paper's order of computation, `resident-first` computes the experts first that are there. All policies let "
        "idle experts go first. MIN is Belady's, which knows the future.\n\n"
    )
    return intro + markdown(("stack", "batch", "buffer", "order", *RULES), body)


def ranks_table(rows: Sequence[SimulatedRow]) -> str:
    """Contiguous beside balanced, the paper's order, at half of a rank's experts."""
    body = []
    for stack in unique(rows, "stack"):
        for policy in RULES:
            cells = []
            for placement in PLACEMENTS:
                of_kind = [row for row in rows if (row.stack, row.placement, row.order, row.policy)
                           == (stack, placement, PAPERS_ORDER, policy)]
                row = min(of_kind, key=lambda each: abs(each.size - each.experts / 2))
                cells += [f"{row.size} of {row.experts}", f"{row.misses:,}", f"{row.worst_misses:,}"]
            body.append((stack, policy, *cells))
    head = ("stack", "policy", "buffer, contiguous", "misses", "worst rank", "buffer, balanced", "misses", "worst rank")
    intro = (
        "Misses of all ranks, and of the one that misses most, in the second half of the batches, in the paper's "
        "order; balanced placement (greedy, for the MT decoder anti-correlation) is fitted on the first half.\n\n"
    )
    return intro + markdown(head, body)


def served_table(rows: Sequence[ServedRow]) -> str:
    whole = whole_rows(rows)

    def buffered(words: str, otherwise: str | None = None):
        return lambda row: otherwise if row.size is None else words.format(row)

    intro = (
        "`--expert-buffer-size`, both stacks, `--expert-store disk`, the default order and policy "
        f"({DEFAULT_ORDER}, {DEFAULT_POLICY}); one thread. Two slots more than the buffer's are for experts on their "
        "way.\n\n"
    )
    return intro + table(
        rows, ("model", "{.model}"), ("batch", "{.batch}"),
        ("buffer", buffered("{0.size} of {0.experts}", "all resident")),
        ("expert bytes in slots", lambda row: f"{row.slot_bytes / row.expert_bytes:.0%}"),
        ("weights in memory", lambda row: f"{row.model_bytes / whole[row.model].model_bytes:.0%}"),
        ("misses", buffered("{0.misses:,} of {0.accesses:,}")), ("simulated", buffered("{.simulated_misses:,}")),
        ("ms a batch", "{.batch_ms:.1f}"),
        ("over all resident", lambda row: f"{row.batch_ms / whole[row.model].batch_ms:.2f}"),
        ("waited for copies", buffered("{.copy_share:.0%}")), ("quality", "{.quality}"),
    )


def findings(
    alone: Sequence[SimulatedRow], shared: Sequence[SimulatedRow], served: Sequence[ServedRow]
) -> list[Finding]:
    found = [_lifo_beats_fifo(of_stack) for of_stack in grouped(alone, "stack").values()]
    for of_stack in grouped(shared, "stack").values():
        found += [_balanced_misses_fewer(of_stack), _close_to_min(of_stack)]
    return found + [_saves(served, model) for model in whole_rows(served)]


def _misses(rows: Sequence[SimulatedRow], policy: str, placement: str = "contiguous") -> dict[float, SimulatedRow]:
    """By size over the experts that a rank holds, those in which not all of them fit; the paper's order."""
    return {
        row.size / row.experts: row
        for row in rows
        if (row.order, row.policy, row.placement) == (PAPERS_ORDER, policy, placement) and row.size < row.experts
    }


def _lifo_beats_fifo(of_stack: Sequence[SimulatedRow]) -> Finding:
    lifo, fifo = (_misses(of_stack, policy) for policy in ("lifo", "fifo"))
    fewer = sum(lifo[size].misses < fifo[size].misses for size in lifo)
    equal = sum(lifo[size].misses == fifo[size].misses for size in lifo)
    totals = [sum(row.misses for row in each.values()) for each in (lifo, fifo)]
    return Finding(
        f"LIFO beats FIFO ({of_stack[0].kind})", SOURCE,
        "in the paper's order of computation LIFO misses fewer over all sizes together, and more at none",
        f"fewer at {fewer} and equal at {equal} of {len(lifo)} sizes; {totals[0]:,} against {totals[1]:,} misses "
        f"over all of them ({of_stack[0].stack})",
        totals[0] < totals[1] and fewer + equal == len(lifo),
    )


def _balanced_misses_fewer(of_stack: Sequence[SimulatedRow]) -> Finding:
    lifo = [_misses(of_stack, "lifo", placement).values() for placement in PLACEMENTS]
    totals, worst = ([sum(getattr(row, name) for row in each) for each in lifo] for name in ("misses", "worst_misses"))
    return Finding(
        f"balanced placement lowers misses ({of_stack[0].kind})", SOURCE,
        f"under LIFO at least {FEWER:.0%} fewer misses of all ranks together, over all sizes, than under contiguous "
        "placement",
        f"{totals[1]:,} against {totals[0]:,} on {of_stack[0].ranks} ranks; of the rank that misses most {worst[1]:,} "
        f"against {worst[0]:,} ({of_stack[0].stack})",
        totals[1] <= (1 - FEWER) * totals[0],
    )


def _close_to_min(of_stack: Sequence[SimulatedRow]) -> Finding:
    (*even,), (lifo, least) = (
        [sum(row.misses for row in _misses(of_stack, policy, placement).values()) for policy in ("lifo", MIN)]
        for placement in PLACEMENTS
    )
    return Finding(
        f"LIFO with balanced placement comes very close to MIN ({of_stack[0].kind})", SOURCE,
        f"at most {CLOSE:g} times MIN's misses under the same placement, over all sizes",
        f"{lifo / least:.2f} times, contiguous {even[0] / even[1]:.2f} ({of_stack[0].stack})",
        lifo <= CLOSE * least,
    )


def _saves(rows: Sequence[ServedRow], model: str) -> Finding:
    """At the smallest buffer; the paper's saving is of static gating's whole memory, ours of the weights."""
    whole = whole_rows(rows)[model]
    smallest = min((row for row in rows if row.model == model and row.size is not None), key=lambda row: row.size)
    saved, most = 1 - smallest.model_bytes / whole.model_bytes, paper_value("buffering.saved-most")
    return Finding(
        f"a small buffer saves up to {most:.1%} of the memory", SOURCE,
        "the smallest buffer that was served saves at least as large a share of the weights' bytes",
        f"{saved:.1%} with {smallest.size} of {smallest.experts} experts ({model}), at "
        f"{smallest.batch_ms / whole.batch_ms:.1f} times the time",
        saved >= most,
    )


def draw_misses(file: Path, rows: Sequence[SimulatedRow]) -> None:
    """Miss rate against size; a column per stack, a row per order of computation."""
    stacks = unique(rows, "stack")
    figure, axes = panels(len(ORDERS), len(stacks), width=4.4, height=3.4, sharey=True, sharex="col")
    for of_order, order in zip(axes, reversed(ORDERS), strict=True):
        for panel, stack in zip(of_order, stacks, strict=True):
            for policy in RULES:
                curve = [row for row in rows if (row.stack, row.order, row.policy) == (stack, order, policy)]
                xs, ys = [row.size for row in curve], [100 * row.miss_rate for row in curve]
                panel.plot(xs, ys, label=policy.upper(), markersize=4, **LOOKS[policy])
            panel.set_title(f"{stack}, batches of {curve[0].batch}, {order}", fontsize=10)
        of_order[0].set_ylabel("% of accesses that miss")
    for panel in axes[-1]:
        panel.set_xlabel("experts in the buffer")
    axes[0][0].legend(fontsize=8)
    save(figure, file)


def draw_ranks(file: Path, rows: Sequence[SimulatedRow]) -> None:
    """Misses against size per rank in the paper's order: contiguous filled, balanced hollow."""
    stacks = unique(rows, "stack")
    figure, (row_of_panels,) = panels(1, len(stacks), width=4.6, height=4.0)
    for panel, stack in zip(row_of_panels, stacks, strict=True):
        for policy in ("lifo", "fifo", MIN):
            for placement in PLACEMENTS:
                curve = [row for row in rows if (row.stack, row.order, row.policy, row.placement)
                         == (stack, PAPERS_ORDER, policy, placement)]
                balanced = placement == PLACEMENTS[1]
                looks = {"color": LOOKS[policy]["color"], "marker": LOOKS[policy]["marker"] or "x",
                         "linestyle": "--" if balanced else "-", "markerfacecolor": "white" if balanced else None}
                xs, ys = [row.size for row in curve], [row.misses for row in curve]
                panel.plot(xs, ys, label=f"{policy.upper()}, {placement}", markersize=5, **looks)
        panel.set(title=f"{stack}, {curve[0].ranks} ranks", xlabel="experts in each rank's buffer", ylim=(0, None))
    row_of_panels[0].set_ylabel("misses of all ranks")
    row_of_panels[0].legend(fontsize=8)
    save(figure, file)


def draw_served(file: Path, rows: Sequence[ServedRow]) -> None:
    """Time of a batch, and weights in memory, against the buffer's size, both over all experts resident."""
    figure, (row_of_panels,) = panels(1, 2, width=5.2, height=4.0)
    for number, (model, whole) in enumerate(whole_rows(rows).items()):
        of_model = sorted((row for row in rows if row.model == model), key=lambda row: row.size or row.experts)
        sizes = [100 * (row.size or row.experts) / row.experts for row in of_model]
        looks = {**look(number), "label": f"{model}, batches of {whole.batch}"}
        row_of_panels[0].plot(sizes, [row.batch_ms / whole.batch_ms for row in of_model], **looks)
        row_of_panels[1].plot(sizes, [100 * row.model_bytes / whole.model_bytes for row in of_model], **looks)
    row_of_panels[0].set(ylabel="time of a batch / all resident", ylim=(0, None))
    row_of_panels[1].set(ylabel="weights in memory, % of all resident", ylim=(0, 104))
    for panel in row_of_panels:
        panel.set_xlabel("% of a layer's experts in the buffer (100: resident)")
        panel.legend(fontsize=8, loc="lower right")
    save(figure, file)


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
