#!/usr/bin/env python3
"""Whether it would pay to compute a rank's own rows while the other ranks' travel: the served round beside that one.

Both run in turn in one group of processes over gloo, one thread each; medians of rank 0. The variant lives here alone:
it reads every active expert's weights twice, for the own rows and for those that arrive.

    python scripts/benchmarks/benchmark_pipelining.py --ranks 2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from benchmark_exchange import shared_layer
from torch import Tensor

from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.process_group import start_group
from fairseq_moe_ext.ranks.round import IDLE, Arrivals, Round

# tokens of a rank, experts, model dim, hidden dim
SHAPES = ((1024, 64, 256, 1024), (64, 64, 256, 1024), (1024, 32, 512, 2048), (4096, 16, 256, 512))
NOTHING = Arrivals(None, [], 0)


def pipelined(self: Round, sent: Tensor, sent_bytes: list[int]) -> Tensor:
    """As Round.exchange, the rank's own rows computed while the others' are on their way."""
    if all(message.layer == IDLE for message in self.messages):
        return sent
    rank, ranks = self._exchange.rank, range(self._exchange.world_size)
    arrivals = [self._arrivals_from(source) for source in ranks]
    parts = list(sent.split(sent_bytes))
    to_others = [0 if each == rank else sent_bytes[each] for each in ranks]
    from_others = [0 if each == rank else arrivals[each].num_bytes for each in ranks]
    arrived = sent.new_empty(sum(from_others))
    others = torch.cat([part for each, part in enumerate(parts) if each != rank])
    travelling = dist.all_to_all_single(arrived, others, from_others, to_others, async_op=True)
    own = self._compute(parts[rank], [arrivals[each] if each == rank else NOTHING for each in ranks])
    travelling.wait()
    outputs = self._compute(arrived, [NOTHING if each == rank else arrivals[each] for each in ranks])
    returned = sent.new_empty(sum(to_others))
    dist.all_to_all_single(returned, outputs, to_others, from_others)
    results = list(returned.split(to_others))
    results[rank] = own
    return torch.cat(results)


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=args.ranks)
    layer = shared_layer("dynamic", Exchange(start_group()), args)
    tokens = torch.randn(1, args.tokens, args.model_dim, generator=torch.Generator().manual_seed(rank))
    ways = {"served": Round.exchange, "pipelined": pipelined}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    expected = layer(tokens)
    for number in range(args.rounds + 2):
        for name, way in ways.items():
            Round.exchange = way
            start = time.perf_counter()
            found = layer(tokens)
            if number >= 2:
                taken[name].append(1000 * (time.perf_counter() - start))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if rank == 0:
        served, piped = (statistics.median(taken[name]) for name in ways)
        shape = f"{args.tokens} tokens, {args.experts} experts, {args.model_dim} x {args.hidden_dim}"
        print(f"| {shape} | {served:.1f} | {piped:.1f} | {piped / served:.2f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    args.capacity_fraction = 1.0  # what shared_layer asks for; dynamic gating has none
    if args.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {args.ranks}")
    print("| of a rank | served, ms | pipelined, ms | ratio |\n|---|---|---|---|", flush=True)
    for args.tokens, args.experts, args.model_dim, args.hidden_dim in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(measure, (args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
