"""Throughput against batch size: static, sparse static and dynamic gating; the largest batch within a memory limit.

    bash scripts/reproduce_throughput.sh
    CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_throughput.sh --memory-limit 500

results/throughput/ gets throughput.csv, throughput.md and throughput.png. Batches grow by doubling until the peak of
the batch's tensors, as measured, is past the limit; the default limit is what static gating takes at the paper's
largest static batch, so that, as there, static gating can go no further. Sparse static has static gating's slots and
padding, found by indices and not by a mask, as Tutel does it.
Source: "Toward Efficient Inference for Mixture of Experts", throughput.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from reproduction import tables
from reproduction.ladder import PAPER_KEYS, Ladder, one_of, waste_sentence
from reproduction.paper import beside_paper
from reproduction.passes import DYNAMIC, GATINGS, SPARSE, STATIC, Pass
from reproduction.plots import look, over_batches, panels, save
from reproduction.stacks import DECODER
from reproduction.study import FRACTION, Option, Study, run_study
from reproduction.tables import Finding, findings_section, grouped, markdown, unique, write_csv

SERVED = (STATIC, SPARSE, DYNAMIC)
LARGEST = 64  # times the paper's batch
SECTION = "section on throughput"


@dataclass(frozen=True)
class Best:
    """One stack under one gating: the largest batch within the limit, and the most tokens/s at any that is."""

    model: str
    stack: str
    gating: str
    largest_batch: int
    tokens_per_second: float
    at_batch: int
    is_open: bool  # the limit was not reached


def climb(ladder: Ladder, megabytes: float | None, bar: tqdm) -> tuple[list[Pass], int]:
    """All that was measured, and the limit in bytes; megabytes None: static gating's peak at the paper's batch."""
    passes: list[Pass] = []
    for rows in ladder.small:
        passes += ladder.measure(rows, GATINGS)
        bar.update()
    if megabytes is None:
        limit = one_of(passes, gating=STATIC, batch=ladder.base).peak_bytes
        within = [SPARSE, DYNAMIC]
    else:
        limit, within = int(1e6 * megabytes), list(SERVED)
    rows = ladder.base
    while rows < LARGEST * ladder.base:
        within = [gating for gating in within if one_of(passes, gating=gating, batch=rows).peak_bytes <= limit]
        if not within:
            break
        rows *= 2
        bar.set_postfix_str(f"batch {rows}")
        passes += ladder.measure(rows, within)
        bar.update()
    return [each for each in passes if each.gating in SERVED], limit


def best_of(passes: Sequence[Pass], limit: int) -> list[Best]:
    """Per stack and gating; none where nothing is within the limit."""
    found = []
    for (model, stack), of_stack in grouped(passes, "model", "stack").items():
        for gating in SERVED:
            of_gating = [each for each in of_stack if each.gating == gating]
            fitting = [each for each in of_gating if each.peak_bytes <= limit]
            if fitting:
                fastest = max(fitting, key=lambda each: each.tokens_per_second)
                largest = max(fitting, key=lambda each: each.batch)
                is_open = len(fitting) == len(of_gating) and largest.peak_bytes < limit
                speed = fastest.tokens_per_second
                found.append(Best(model, stack, gating, largest.batch, speed, fastest.batch, is_open))
    return found


def ratio(best: Sequence[Best], stack: tuple[str, str], over: str) -> float:
    """Dynamic gating's most tokens/s over another gating's."""
    dynamic, other = (
        next(each for each in best if (each.model, each.stack) == stack and each.gating == gating)
        for gating in (DYNAMIC, over)
    )
    return dynamic.tokens_per_second / other.tokens_per_second


def table(passes: Sequence[Pass], limits: dict[str, int]) -> str:
    head = ("stack", "batch", *(f"{gating}, tokens/s" for gating in SERVED), "dynamic / static",
            "dynamic / sparse static", *(f"{gating}, peak MB" for gating in SERVED))
    body = []
    for (model, stack), of_stack in grouped(passes, "model", "stack").items():
        for batch in sorted({each.batch for each in of_stack}):
            static, sparse, dynamic = at = [one_of(of_stack, gating=gating, batch=batch) for gating in SERVED]
            speeds = [each and each.tokens_per_second for each in at]
            body.append((
                stack, batch, *(speed and f"{speed:,.0f}" for speed in speeds),
                *(f"{speeds[2] / other:.2f}" if dynamic and other else None for other in speeds[:2]),
                *(each and _peak(each, limits[model]) for each in at),
            ))
    return markdown(head, body)


def _peak(each: Pass, limit: int) -> str:
    return f"{each.peak_bytes / 1e6:.1f}{' (past the limit)' if each.peak_bytes > limit else ''}"


def best_table(best: Sequence[Best]) -> str:
    return tables.table(
        best, ("stack", "{.stack}"), ("gating", "{.gating}"),
        ("largest batch", lambda each: f"{'at least ' if each.is_open else ''}{each.largest_batch}"),
        ("most tokens/s", "{.tokens_per_second:,.0f}"), ("at batch", "{.at_batch}"),
        ("dynamic over it", lambda each: f"{ratio(best, (each.model, each.stack), each.gating):.2f}"),
    )


def beside(best: Sequence[Best]) -> list[tuple[str, str]]:
    """(key of the paper's figure, ours)"""
    found = []
    for stack in dict.fromkeys((each.model, each.stack) for each in best):
        key = PAPER_KEYS[stack[1]]
        found.append((f"throughput.{key}.over-static", f"{ratio(best, stack, STATIC):.2f}x"))
        found.append((f"throughput.{key}.over-tutel", f"{ratio(best, stack, SPARSE):.2f}x over sparse static"))
        if stack[1] != DECODER:
            for gating in (STATIC, DYNAMIC):
                (each,) = (each for each in best if (each.model, each.stack) == stack and each.gating == gating)
                found.append((f"throughput.{key.partition('-')[0]}.largest-batch-{gating}", each.largest_batch))
    return found


def findings(best: Sequence[Best]) -> list[Finding]:
    found = []
    for model, stack in dict.fromkeys((each.model, each.stack) for each in best):
        over = {gating: ratio(best, (model, stack), gating) for gating in (STATIC, SPARSE)}
        found.append(Finding(
            f"dynamic gating has several times static gating's throughput ({stack})",
            SECTION,
            "at least twice, each at its best batch within the limit",
            f"{over[STATIC]:.1f} times ({model})",
            over[STATIC] >= 2,
        ))
        found.append(Finding(
            f"and more than static gating without its mask has, as Tutel is ({stack})",
            SECTION,
            "at least a tenth more than sparse static, each at its best batch within the limit",
            f"{over[SPARSE]:.2f} times ({model})",
            over[SPARSE] >= 1.1,
        ))
        if stack != DECODER:
            static, dynamic = (
                next(each for each in best if (each.model, each.stack, each.gating) == (model, stack, gating))
                for gating in (STATIC, DYNAMIC)
            )
            found.append(Finding(
                f"in the same memory dynamic gating takes larger batches ({model})",
                SECTION,
                "at least twice static gating's",
                f"{dynamic.largest_batch} against {static.largest_batch}",
                dynamic.largest_batch >= 2 * static.largest_batch,
            ))
    return found


def draw(file, passes: Sequence[Pass], limits: dict[str, int]) -> None:
    """Per stack tokens/s, and below the peak of memory with the limit, over the batches."""
    stacks = grouped(passes, "model", "stack")
    figure, axes = panels(2, len(stacks), width=4.4, height=3.5)
    for (speeds, peaks), ((model, stack), of_stack) in zip(axes.T, stacks.items(), strict=True):
        for gating in SERVED:
            of_gating = [each for each in of_stack if each.gating == gating]
            how = {**look(GATINGS.index(gating)), "label": gating}  # one colour in all pictures
            batches = [each.batch for each in of_gating]
            speeds.plot(batches, [each.tokens_per_second for each in of_gating], **how)
            peaks.plot(batches, [each.peak_bytes / 1e6 for each in of_gating], **how)
        peaks.axhline(limits[model] / 1e6, color="black", linestyle=":", label="limit")
        ticks = unique(of_stack, "batch")
        over_batches(speeds, ticks, title=stack, ylabel="tokens/s")
        over_batches(peaks, ticks, ylabel="peak of a batch's tensors, MB")
    save(figure, file)


def make(study: Study) -> str:
    passes, best, limits = [], [], {}
    with tqdm(unit="batch") as bar:
        for model in study.models:
            bar.set_description(model.name)
            found, limits[model.name] = climb(Ladder(study, model), study.args.memory_limit, bar)
            passes += found
            best += best_of(found, limits[model.name])
    for model in study.models:
        if not {each.gating for each in best if each.model == model.name} >= set(SERVED):
            raise ValueError(f"--memory-limit must have room for a small batch of {model.name} under every gating")
    write_csv(study.file(".csv"), [
        {"model": each.model, "stack": each.stack, "gating": each.gating, "batch": each.batch, "tokens": each.tokens,
         "milliseconds": each.milliseconds, "tokens_per_second": each.tokens_per_second, "peak_bytes": each.peak_bytes,
         "limit_bytes": limits[each.model]}
        for each in passes
    ])
    draw(study.file(".png"), passes, limits)
    told = ", ".join(f"{limit / 1e6:.1f} MB ({name.replace('_', ' ')})" for name, limit in limits.items())
    where = "static gating's peak at the paper's largest static batch" if study.args.memory_limit is None else "given"
    parts = [
        "# Throughput",
        f"Tokens/s of each stack, medians, one thread; static gating at a capacity fraction of "
        f"{study.args.capacity_fraction:g}. The limit on the peak of a batch's tensors is {told}: {where}.",
        table(passes, limits),
        "## Within the limit",
        best_table(best),
        "## Beside the paper",
        beside_paper(beside(best)),
        waste_sentence(passes),
        "The paper's ratios of several nodes and those over Tutel and MegaBlocks themselves want GPUs; sparse static "
        "stands in for Tutel.",
        findings_section(findings(best)),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    limit = Option("memory-limit", "of a batch's tensors (static gating's at the paper's batch)", None, float,
                   metavar="MB", above=0)
    return run_study("throughput", __doc__, make, arguments, [FRACTION, limit])
