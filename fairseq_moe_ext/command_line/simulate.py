"""How often a buffer of every size would miss, by order and eviction policy, from a recorded routing.

    fairseq-moe simulate trace.npz --output DIR
    fairseq-moe simulate trace.npz --output DIR --world-size 4 --expert-placement placement.json

The trace is one that `--moe-trace` wrote; with `--world-size` every rank has a buffer for the experts that it holds,
contiguous ones without a placement, and the sizes are those up to the fewest experts of a rank that holds any. DIR
gets buffer.csv (every layer, then the mean over the layers and the worst layer) and, where there is matplotlib,
buffer.png (the mean as a line, the worst layer as a dashed one, Belady's MIN in black).

    fairseq-moe simulate trace.npz --output DIR --expert-bytes 50M --disk-rate 2G --profile other.npz

With `--expert-bytes` the run is played once more by two clocks, of the disk and of the computation, for every size,
policy and prefetcher that is named: DIR gets replay.csv and replay.json, and the rows of all phases are printed. The
seconds are those of the rates that are given here; nothing is measured.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from fairseq_moe_ext.atomic_file import new_file, refuse_unwritable
from fairseq_moe_ext.balancing.placement import contiguous, load_placement
from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY, ORDERS, POLICIES
from fairseq_moe_ext.buffering.model_calls import ModelCall, model_calls
from fairseq_moe_ext.buffering.rates import Rates
from fairseq_moe_ext.buffering.rounds import loads_of_ranks
from fairseq_moe_ext.buffering.simulation import MIN, LayerLoads, Outcome, layers_of, simulate_all
from fairseq_moe_ext.command_line.parsing import (
    NO_MATPLOTLIB,
    byte_size,
    command_parser,
    has_matplotlib,
    positive,
    seconds,
)
from fairseq_moe_ext.command_line.replay_table import (
    PREFETCHERS,
    Slots,
    in_words,
    policy_names,
    replay_rows,
    write_replay,
)
from fairseq_moe_ext.command_line.report_rates import rates_of_report
from fairseq_moe_ext.command_line.run_profile import by_score, expert_scores
from fairseq_moe_ext.trace import load_trace

COLUMNS = ("layer", "size", "order", "policy", "accesses", "misses", "miss_rate", "times_min")
COLOURS = {**{policy: f"C{number}" for number, policy in enumerate(POLICIES)}, MIN: "black"}
MEAN, WORST = "mean", "worst"


def table(outcomes: Sequence[Outcome]) -> list[tuple]:
    """One row per outcome, then per size, order and policy the mean over the layers and the worst layer.

    times_min: misses over those of MIN in the same order; empty where MIN has none. Means are of the layers' miss
    rates; the misses of a mean row are the layers' together.
    """
    minimum = {(each.layer, each.size, each.order): each.misses for each in outcomes if each.policy == MIN}
    groups: dict[tuple, list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault((each.size, each.order, each.policy), []).append(each)

    def row(name: str, key: tuple, *group: Outcome) -> tuple:
        least = sum(minimum[each.layer, each.size, each.order] for each in group)
        accesses, misses = sum(each.accesses for each in group), sum(each.misses for each in group)
        rate = sum(each.miss_rate for each in group) / len(group)
        return name, *key, accesses, misses, f"{rate:.6f}", f"{misses / least:.4f}" if least else ""

    rows = [row(each.layer, (each.size, each.order, each.policy), each) for each in outcomes]
    rows += [row(MEAN, key, *group) for key, group in groups.items()]
    worst = {key: max(group, key=lambda each: each.miss_rate) for key, group in groups.items()}
    return rows + [row(f"{WORST}: {each.layer}", key, each) for key, each in worst.items()]


def draw(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Miss rate against buffer size, one panel per order."""
    from matplotlib.figure import Figure  # an extra

    rates: dict[tuple, list[float]] = {}
    for each in outcomes:
        rates.setdefault((each.order, each.policy, each.size), []).append(each.miss_rate)
    sizes = sorted({each.size for each in outcomes})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for panel, order in zip(figure.subplots(1, len(ORDERS), sharey=True), ORDERS, strict=True):
        for policy, colour in COLOURS.items():
            at_size = [rates[order, policy, size] for size in sizes]
            panel.plot(sizes, [sum(found) / len(found) for found in at_size], color=colour, label=policy)
            panel.plot(sizes, [max(found) for found in at_size], color=colour, linestyle="--", linewidth=0.8)
        panel.set(title=order, xlabel="experts in the buffer")
    figure.axes[0].set_ylabel("miss rate (dashed: worst layer)")
    figure.axes[0].legend()
    with new_file(file) as opened:
        figure.savefig(opened, dpi=120, format="png")


def misses_at_a_quarter(layers: Sequence[LayerLoads], outcomes: Sequence[Outcome]) -> str:
    """The misses where a quarter of the experts is resident, or at the largest size."""
    misses = {(each.layer, each.size, each.order, each.policy): each.misses for each in outcomes}
    largest, policies = max(each.size for each in outcomes), (*POLICIES, MIN)
    rows = []
    for layer in layers:
        size = min(max(layer.num_experts // 4, 1), largest)
        for order in ORDERS:
            rows.append((layer.name, size, order, *(misses[layer.name, size, order, policy] for policy in policies)))
    return tabulate(rows, ("layer", "size", "order", *policies), tablefmt="plain")


def on_ranks(args: argparse.Namespace, layers: Sequence[LayerLoads]) -> list[LayerLoads]:
    """Every layer as each rank sees it, named by both."""
    num_experts = {layer.name: layer.num_experts for layer in layers}
    if args.profile:
        raise ValueError("--profile must go without --world-size")
    if args.expert_placement:
        placement = load_placement(args.expert_placement)
        placement.check_fits(args.world_size, num_experts)
        places = placement.layers
    else:
        places = {name: contiguous(count, args.world_size) for name, count in num_experts.items()}
    found = loads_of_ranks(load_trace(args.trace), places, args.world_size)
    return [
        replace(layer, name=f"{layer.name}, rank {rank}")
        for rank, each in found.items()
        for layer in each
        if layer.num_experts  # a rank may hold none, and has no buffer then
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe simulate` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("simulate", __doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for buffer.csv and buffer.png")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that share the experts and the batches")
    parser.add_argument("--expert-placement", type=Path, help="which rank holds which expert (.json)")
    profile = "another trace, or a profile (.json), whose first experts are resident at the start"
    parser.add_argument("--profile", type=Path, help=profile)
    parser.add_argument("--profile-languages", nargs="+", metavar="LANGUAGE", help="of a profile (default: all it has)")
    clocks = add_clocks(parser)
    args = parser.parse_args(arguments)
    if args.expert_bytes is None and (given := [name for name, value in clocks(args).items() if value is not None]):
        parser.error(f"--{given[0].replace('_', '-')} must go with --expert-bytes, which turns the clocks on")
    if args.expert_bytes is not None and (args.world_size != 1 or args.expert_placement):
        parser.error("--expert-bytes must go without --world-size and --expert-placement, for it plays one process")
    if args.report and any(each is not None for each in (args.expert_seconds, args.row_seconds, args.dense_seconds)):
        parser.error("--report must go without --expert-seconds, --row-seconds and --dense-seconds, which it has")
    if args.expert_prefetch and "hot-set" in args.expert_prefetch and not args.profile:
        parser.error("--expert-prefetch hot-set must go with --profile, whose hottest experts it takes")
    try:
        layers = layers_of(load_trace(args.trace))
        if args.profile_languages and not args.profile:
            raise ValueError("--profile-languages must go with --profile")
        num_experts = {layer.name: layer.num_experts for layer in layers}
        scores = expert_scores(args.profile, args.profile_languages, num_experts) if args.profile else {}
        if args.world_size != 1 or args.expert_placement:
            layers = on_ranks(args, layers)
        clock_rates = rates_of(args) if args.expert_bytes is not None else None
        calls = model_calls(load_trace(args.trace)) if clock_rates else []
        of_phase = rates_of_report(args.report, calls, clock_rates) if args.report else {}
    except ValueError as error:
        parser.error(str(error))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output must be a folder that can be written, got {args.output}: {error.strerror}")
    for name in ("buffer.csv", "buffer.png", *(("replay.csv", "replay.json") if clock_rates else ())):
        refuse_unwritable(parser, "--output", args.output / name)
    rankings = {name: by_score(each) for name, each in scores.items()}
    sizes = range(1, min(layer.num_experts for layer in layers) + 1)
    outcomes = [each for layer in layers for each in simulate_all(layer, sizes, rankings.get(layer.name))]
    print(misses_at_a_quarter(layers, outcomes))
    with new_file(args.output / "buffer.csv", text=True) as opened:
        csv.writer(opened).writerows([COLUMNS, *table(outcomes)])
    if has_matplotlib():
        draw(args.output / "buffer.png", outcomes)
    else:
        print(f"buffer.png is left out: it {NO_MATPLOTLIB}", file=sys.stderr)
    if clock_rates is not None:
        play(args, calls, clock_rates, of_phase, layers, scores)
    return 0


def add_clocks(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], dict]:
    """The options of a replay; gives what reads those off that do nothing without --expert-bytes."""
    parser.add_argument("--expert-bytes", type=byte_size, metavar="SIZE", help="of one expert; turns the clocks on")
    group = parser.add_argument_group("clocks, with --expert-bytes")
    options = [
        group.add_argument("--expert-buffer-size", type=positive, nargs="+", metavar="N",
                           help="experts per layer in the buffer (default: a quarter of them)"),
        group.add_argument("--expert-eviction", choices=policy_names(), nargs="+", metavar="POLICY",
                           help=f"{', '.join(policy_names())} (default: {DEFAULT_POLICY} {MIN})"),
        group.add_argument("--expert-order", choices=ORDERS, help=f"default: {DEFAULT_ORDER}"),
        group.add_argument("--expert-prefetch", choices=PREFETCHERS, nargs="+", metavar="WHICH",
                           help=f"{', '.join(PREFETCHERS)} (default: all; hot-set where there is a --profile)"),
        group.add_argument("--disk-rate", type=byte_size, metavar="SIZE",
                           help="bytes/s of the disk or link, all readers together (default: 1G)"),
        group.add_argument("--read-latency", type=seconds, metavar="SECONDS", help="of every read (default: 0.0001)"),
        group.add_argument("--readers", type=positive, metavar="N", help="reads at a time (default: 4)"),
        group.add_argument("--staging", type=positive, metavar="N",
                           help="slots for experts on their way, for all layers together (default: 4)"),
        group.add_argument("--ahead", type=positive, metavar="N",
                           help="slots for prefetched experts, for all layers together (default: one for 8 kept)"),
        group.add_argument("--report", type=Path,
                           help="of the trace's run, all experts resident: what computation costs is taken from it"),
        group.add_argument("--expert-seconds", type=seconds, metavar="SECONDS",
                           help="of a computed expert (default: 0.0001)"),
        group.add_argument("--row-seconds", type=seconds, metavar="SECONDS",
                           help="of each of its rows besides (default: 0.00001)"),
        group.add_argument("--miss-seconds", type=seconds, metavar="SECONDS",
                           help="that the computation spends on a missed expert besides (default: 0)"),
        group.add_argument("--dense-seconds", type=seconds, metavar="SECONDS",
                           help="of all else, per call of a MoE layer (default: 0.001)"),
    ]  # fmt: skip
    return lambda args: {option.dest: getattr(args, option.dest) for option in options}


def given(value, default):
    """Of an option."""
    return default if value is None else value


def rates_of(args: argparse.Namespace) -> Rates:
    """What the options say that things cost."""
    return Rates(
        args.expert_bytes,
        given(args.disk_rate, 2**30),
        given(args.read_latency, 1e-4),
        given(args.readers, 4),
        given(args.expert_seconds, 1e-4),
        given(args.row_seconds, 1e-5),
        given(args.dense_seconds, 1e-3),
        given(args.miss_seconds, 0.0),
    )


def play(
    args: argparse.Namespace,
    calls: Sequence[ModelCall],
    rates: Rates,
    of_phase: Mapping[str, Rates],
    layers: Sequence[LayerLoads],
    scores: Mapping[str, np.ndarray],
) -> None:
    """The replay that the options ask for, printed and written."""
    slots = Slots(given(args.staging, 4), args.ahead)
    rows = replay_rows(
        calls,
        rates,
        given(args.expert_buffer_size, [max(1, max(layer.num_experts for layer in layers) // 4)]),
        given(args.expert_eviction, [DEFAULT_POLICY, MIN]),
        given(args.expert_prefetch, [each for each in PREFETCHERS if each != "hot-set" or scores]),
        given(args.expert_order, DEFAULT_ORDER),
        slots,
        scores,
        {name: by_score(each) for name, each in scores.items()},
        of_phase,
    )
    write_replay(args.output, rows, rates, slots, of_phase)
    print()
    print(in_words(rows))
