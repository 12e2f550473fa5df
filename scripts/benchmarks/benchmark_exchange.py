#!/usr/bin/env python3
"""What the exchange between ranks costs: a round without tokens, and a layer's round under both gatings.

Ranks are processes on this machine over gloo, one thread each. Medians over the rounds; per rank the same batch size.

    python scripts/benchmarks/benchmark_exchange.py --ranks 2 --tokens 1024 --experts 64
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from fairseq_moe_ext.balancing.placement import contiguous  # noqa: E402
from fairseq_moe_ext.experts.resident import ResidentExperts  # noqa: E402
from fairseq_moe_ext.gating import MOELayer, Top2Gate  # noqa: E402
from fairseq_moe_ext.gating.replicas import Replicas  # noqa: E402
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for  # noqa: E402
from fairseq_moe_ext.ranks.dispatcher import over_ranks  # noqa: E402
from fairseq_moe_ext.ranks.exchange import Exchange  # noqa: E402
from fairseq_moe_ext.ranks.process_group import start_group  # noqa: E402
from reproduction.tables import markdown  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("tokens", 1024), ("experts", 64), ("model-dim", 256), ("hidden-dim", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--capacity-fraction", type=float, default=1.0, help="static gating's")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not 1 <= args.ranks <= args.experts:
        parser.error(f"--ranks must be from 1 to the experts, {args.experts}, got {args.ranks}")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (args, folder), nprocs=args.ranks)


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=args.ranks)
    exchange = Exchange(start_group())
    layers = {gating: shared_layer(gating, exchange, args) for gating in ("dynamic", "static")}
    tokens = torch.randn(1, args.tokens, args.model_dim, generator=torch.Generator().manual_seed(rank))
    rows = [("round without tokens", *timed(lambda: exchange.idle_round(alive=True), 10 * args.rounds), 0)]
    one_alone = (lambda: layers["dynamic"](tokens[:, :1])) if rank == 0 else (lambda: exchange.idle_round(alive=False))
    rows.append(("one rank's lone token, the others idle", *timed(one_alone, 10 * args.rounds), 0))
    for gating, layer in layers.items():
        calls = []
        layer.observe(calls.append)
        milliseconds, deviation = timed(lambda layer=layer: layer(tokens), args.rounds)
        name = f"{gating} layer, {args.tokens} tokens a rank"
        rows.append((name, milliseconds, deviation, calls[-1].bytes_exchanged))
        for part in ("sizes", "exchange", "experts"):
            taken = [1000 * call.seconds[part] for call in calls]
            rows.append((f"  of it {part}", statistics.median(taken), statistics.pstdev(taken), 0))
    if rank == 0:
        cells = [(name, f"{ms:.2f}", f"{spread:.2f}", f"{sent:,}" if sent else "") for name, ms, spread, sent in rows]
        print(markdown((f"rank 0 of {args.ranks}", "ms", "deviation", "bytes sent"), cells))
    dist.destroy_process_group()


def shared_layer(gating: str, exchange: Exchange, args: argparse.Namespace) -> MOELayer:
    """A random layer, the same on every rank, with this rank's experts."""
    torch.manual_seed(0)
    replicas = Replicas(contiguous(args.experts, args.ranks), exchange.rank, args.ranks)
    gate = Top2Gate(args.model_dim, args.experts, second_expert_policy="all")
    experts = ResidentExperts(args.experts, args.model_dim, args.hidden_dim, local=replicas.local[exchange.rank])
    alone = dispatcher_for(gating, StaticOptions(args.capacity_fraction, count_padding=False))
    return MOELayer(gate, experts, over_ranks(alone, exchange.register(experts, replicas))).eval().requires_grad_(False)


def timed(call, rounds: int) -> tuple[float, float]:
    """Median and deviation in milliseconds."""
    taken = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[2:]), statistics.pstdev(taken[2:])


if __name__ == "__main__":
    main()
