#!/usr/bin/env python3
"""Time a dense int8 layer beside PyTorch's float32 `nn.Linear` of the same dims.

    OMP_NUM_THREADS=1 python scripts/benchmarks/benchmark_dense.py
    python scripts/benchmarks/benchmark_dense.py --threads 2 --dims 1024x1024 --rows 1 64

Both are called in turn, round after round, each time on the next of several layers, whose int8 weights together take
more than --mebibytes: no cache holds them, as in a model that has others between two calls of one. Ratios are float32's
time over int8's, medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from made_experts import int8_linear  # noqa: E402

from fairseq_moe_ext.atomic_file import refuse_unwritable, write_json  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.kernels.cpu_kernel import load_kernel  # noqa: E402
from fairseq_moe_ext.kernels.quantized_kernel import instructions_of  # noqa: E402

DIMS = ((2048, 2048), (8192, 2048), (32000, 1024))  # outputs, inputs
ROWS = (1, 4, 16, 48, 256, 1024)
ROUNDS, SECONDS = 5, 1.0
MEBIBYTES = 128

Product = Callable[[Tensor], Tensor]


def times(layers: list[list[Product]], rows: Tensor, seconds: float) -> list[list[float]]:
    """Milliseconds per round of each list's next layer, for so long, and at least ROUNDS rounds."""
    turns = [cycle(each) for each in layers]
    found: list[list[float]] = [[] for _ in layers]
    for each in layers:
        each[-1](rows)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[0]) < ROUNDS:
        for turn, its in zip(turns, found, strict=True):
            layer = next(turn)
            start = time.perf_counter()
            layer(rows)
            its.append(1000 * (time.perf_counter() - start))
    return found


def dims_of(text: str) -> tuple[int, int]:
    """`OUTPUTSxINPUTS`."""
    outputs, _, inputs = text.partition("x")
    try:
        return positive(outputs), positive(inputs)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"must be OUTPUTSxINPUTS, each at least 1, got {text!r}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=dims_of, nargs="+", default=DIMS, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="measure every number of rows at least so long")
    parser.add_argument("--mebibytes", type=positive, default=MEBIBYTES, help="of int8 weights that take turns")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    if args.output is not None:
        refuse_unwritable(parser, "--output", args.output)
    kernel = load_kernel()
    if kernel is None:
        parser.error("the C kernel is not compiled, or turned off")
    torch.set_num_threads(args.threads)
    body, figures = [], []
    with torch.no_grad(), tqdm(total=len(args.dims) * len(args.rows), disable=not sys.stderr.isatty()) as bar:
        for outputs, inputs in args.dims:
            layers = range(-(-(args.mebibytes << 20) // (outputs * inputs)))
            both = [torch.nn.Linear(inputs, outputs) for _ in layers], [int8_linear(outputs, inputs) for _ in layers]
            for count in args.rows:
                found = times(list(both), torch.randn(count, inputs), args.seconds)
                theirs, ours = (statistics.median(its) for its in found)
                ratios = sorted(a / b for a, b in zip(*found, strict=True))
                ratio, quarters = statistics.median(ratios), statistics.quantiles(ratios, n=4)[::2]
                spread = "{:.2f} to {:.2f}".format(*quarters)
                body.append((f"{outputs} x {inputs}", count, f"{theirs:.2f}", f"{ours:.2f}", f"{ratio:.2f}", spread))
                row = {"outputs": outputs, "inputs": inputs, "rows": count, "float32_ms": theirs, "int8_ms": ours}
                figures.append({**row, "ratio": ratio, "quarters": quarters, "rounds": len(ratios)})
                bar.update()
    head = "outputs x inputs", "rows", "float32, ms", "int8, ms", "float32 / int8", "its quarters"
    print(tabulate(body, head, "github", disable_numparse=True))
    name = instructions_of(kernel)
    print(f"{name}, {args.threads} thread(s)")
    if args.output is not None:
        write_json(args.output, {"instructions": name, "threads": args.threads, "figures": figures})


if __name__ == "__main__":
    main()
