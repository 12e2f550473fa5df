"""Say which rank shall hold which expert: fit a placement on a trace's first half, test it on the second.

    fairseq-moe balance trace.npz --world-size 4 --method local-search --output placement.json

TRACE is what --moe-trace wrote; the placement is served with --expert-placement. The table compares every method on
both halves, whichever of them is written. Max Load: the busiest rank's share of the load in any batch; Avg Max Load:
the mean over batches of the busiest rank's share. An encoder's layers are fitted on its passes, a decoder's on decode
steps where the trace has them, else on teacher-forced passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fairseq_moe_ext.atomic_file import refuse_unwritable
from fairseq_moe_ext.balancing.fit import DECODER_PHASES, fit_layers, phases_of_layers
from fairseq_moe_ext.balancing.load import OBJECTIVES
from fairseq_moe_ext.balancing.placement import Placement, save_placement
from fairseq_moe_ext.balancing.plot import plot_fit
from fairseq_moe_ext.balancing.solve import METHODS, Demand
from fairseq_moe_ext.balancing.table import format_fit
from fairseq_moe_ext.command_line.parsing import NO_MATPLOTLIB, command_parser, failed, has_matplotlib
from fairseq_moe_ext.trace import load_trace


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe balance` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("balance", __doc__)
    parser.add_argument("trace", metavar="TRACE", type=Path)
    parser.add_argument("--world-size", type=int, required=True, metavar="R", help="ranks that will serve")
    parser.add_argument("--method", choices=METHODS, default="local-search", help="whose placement is written")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the placement (.json)")
    parser.add_argument("--objective", choices=OBJECTIVES, default="tokens", help="what is to be even (tokens)")
    parser.add_argument("--steps", action="store_true", help="balance each step of a batch, not the batch's sum")
    parser.add_argument("--phase", choices=DECODER_PHASES, help="what a decoder's layers are fitted on")
    parser.add_argument("--replicas", type=int, default=0, metavar="N", help="more slots, for copies of hot experts")
    parser.add_argument("--experts-per-rank", type=int, metavar="N", help="a rank's most; default: as even as can be")
    parser.add_argument("--time-limit", type=float, default=10, metavar="S", help="seconds per layer and search (10)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="load per rank and per expert (.png)")
    args = parser.parse_args(arguments)
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path is not None:
            refuse_unwritable(parser, flag, path)
    if args.plot is not None and not has_matplotlib():
        parser.error(f"--plot {NO_MATPLOTLIB}")
    if args.method == "contiguous" and args.replicas:
        parser.error(f"--replicas must be 0 for --method contiguous, got {args.replicas}")
    try:
        demand = Demand(args.world_size, args.replicas, args.experts_per_rank, args.time_limit)
        trace = load_trace(args.trace)
        fits = fit_layers(trace, demand, args.objective, args.steps, args.phase)
        layers = list(tqdm(fits, total=len(phases_of_layers(trace, args.phase)), unit="layer", disable=None))
        found = {layer.name: layer.methods[args.method].layer for layer in layers}
        save_placement(args.output, Placement(args.world_size, found, args.method))
        if args.plot is not None:
            plot_fit(args.plot, layers, args.method, args.world_size)
    except (ValueError, OSError) as error:
        return failed(error, 2)
    print(format_fit(layers))
    print(f"\n{args.output}: {args.method}, {len(layers)} layers on {args.world_size} ranks")
    return 0
