#!/usr/bin/env python3
"""Up to how many rows per expert the C kernel is faster than PyTorch's products, on this CPU.

    OMP_NUM_THREADS=1 python scripts/benchmarks/measure_crossing.py
    python scripts/benchmarks/measure_crossing.py --threads 2 --model-dim 2048 --hidden-dim 8192 --experts 2

Both compute the same experts in turn, round after round. The last line is what fairseq_moe_ext/kernels/crossing.py has
in its table for these instructions: the most rows up to which the kernel has not lost anywhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS, DTYPES, load_kernel  # noqa: E402
from fairseq_moe_ext.kernels.crossing import has_units  # noqa: E402
from fairseq_moe_ext.kernels.loop import run_loop  # noqa: E402
from fairseq_moe_ext.kernels.offsets import Offsets  # noqa: E402

ROWS = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)
SECONDS = 0.5  # of each number of rows, at least


def times(args: argparse.Namespace, dtype: torch.dtype, count: int) -> tuple[float, float]:
    """Median seconds of the C kernel and of PyTorch's products, `count` rows for every expert."""
    experts, dim, hidden = args.experts, args.model_dim, args.hidden_dim
    shapes = (experts, hidden, dim), (experts, hidden), (experts, dim, hidden), (experts, dim)
    pool = [torch.randn(shape).to(dtype) for shape in shapes]
    rows, offsets = torch.randn(experts * count, dim).to(dtype), Offsets.of_counts([count] * experts)
    outputs = torch.empty_like(rows)
    found: dict[int, list[float]] = {ANY_ROWS: [], 0: []}
    for most in found:
        run_loop(rows, offsets, None, pool, F.relu, outputs, most=most)
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end or len(found[0]) < 5:
        for most, its in found.items():
            start = time.perf_counter()
            run_loop(rows, offsets, None, pool, F.relu, outputs, most=most)
            its.append(time.perf_counter() - start)
    return statistics.median(found[ANY_ROWS]), statistics.median(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=positive, default=16, help="E; their weights should not fit the cache")
    parser.add_argument("--model-dim", type=positive, default=512, help="D")
    parser.add_argument("--hidden-dim", type=positive, default=2048, help="F")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="rows per expert, rising")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="measure every number of rows at least so long")
    args = parser.parse_args()
    kernel = load_kernel()
    if kernel is None:
        parser.error("the C kernel is not compiled, or turned off")
    torch.set_num_threads(args.threads)
    body, most = [], {}
    for dtype in tqdm(DTYPES, disable=not sys.stderr.isatty()):
        lost = False
        for count in args.rows:
            ours, theirs = times(args, dtype, count)
            lost = lost or ours > theirs
            if not lost:
                most[dtype] = count
            name = str(dtype).removeprefix("torch.")
            body.append((name, count, f"{ours * 1e3:.2f}", f"{theirs * 1e3:.2f}", f"{theirs / ours:.2f}"))
    print(tabulate(body, ("dtype", "rows", "C kernel, ms", "PyTorch, ms", "PyTorch / C kernel"), "github"))
    units = [str(dtype) for dtype in DTYPES if has_units(dtype)]
    print(f"{kernel.name}, {args.threads} thread(s); the CPU multiplies by itself: {', '.join(units) or 'no 16 bits'}")
    found = {str(dtype): "any" if rows == max(args.rows) else rows for dtype, rows in most.items()}
    print(f'"{kernel.instructions}": {found}')


if __name__ == "__main__":
    main()
