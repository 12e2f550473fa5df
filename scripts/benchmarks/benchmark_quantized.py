#!/usr/bin/env python3
"""Time the C kernel's int8 and int4 experts beside its float32 ones, and beside PyTorch's own quantised products.

    OMP_NUM_THREADS=1 python scripts/benchmarks/benchmark_quantized.py
    python scripts/benchmarks/benchmark_quantized.py --threads 2 --model-dim 1024 --hidden-dim 4096 --experts 16

Every expert gets the same number of rows; all are called in turn, round after round, and a time is one expert's: fc1,
relu, fc2. Ratios are float32's time over another's, medians over the rounds. PyTorch's products quantise weights alone,
int8 with one scale per output and int4 with groups of 64; they are given bfloat16 rows, for which they are fastest, and
called expert by expert without biases.

Legend: E = experts, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from made_experts import Call, float_experts, pytorch_experts, quantized_experts  # noqa: E402

from fairseq_moe_ext.atomic_file import refuse_unwritable, write_json  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.kernels.cpu_kernel import load_kernel  # noqa: E402
from fairseq_moe_ext.kernels.quantized_kernel import instructions_of  # noqa: E402

ROWS = (1, 4, 16, 48)
ROUNDS = 7
FLOAT, INT8, INT4 = "float32", "int8", "int4"
PEERS = {8: "PyTorch int8", 4: "PyTorch int4"}


def times(calls: dict[str, Call], rounds: int, experts: int) -> dict[str, list[float]]:
    """Milliseconds of one expert, round by round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:  # the first round only warms up
                found[name].append(1000 * (time.perf_counter() - start) / experts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=positive, default=4, help="E; their int4 weights should not fit the cache")
    parser.add_argument("--model-dim", type=positive, default=2048, help="D")
    parser.add_argument("--hidden-dim", type=positive, default=8192, help="F")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="rows per expert")
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    parser.add_argument("--no-peers", action="store_true", help="leave PyTorch's products out")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    if args.output is not None:
        refuse_unwritable(parser, "--output", args.output)
    kernel = load_kernel()
    if kernel is None:
        parser.error("the C kernel is not compiled, or turned off")
    torch.set_num_threads(args.threads)
    dims = args.experts, args.model_dim, args.hidden_dim
    makers = {FLOAT: float_experts(*dims), INT8: quantized_experts(*dims, 8), INT4: quantized_experts(*dims, 4)}
    for bits, name in {} if args.no_peers else PEERS.items():
        maker = pytorch_experts(*dims, bits)
        if maker is not None:
            makers[name] = maker
    others = list(makers)[1:]
    body, figures = [], []
    with torch.no_grad():
        for count in tqdm(args.rows, disable=not sys.stderr.isatty()):
            calls = {name: prepare(count) for name, prepare in makers.items()}
            found = times(calls, args.rounds, args.experts)
            middle = {name: statistics.median(its) for name, its in found.items()}
            ratios = {name: statistics.median(a / b for a, b in zip(found[FLOAT], found[name], strict=True))
                      for name in others}
            numbers = *(middle[name] for name in makers), *(ratios[name] for name in others)
            body.append((count, *(f"{number:.2f}" for number in numbers)))
            figures.append({"rows": count, "milliseconds": middle, "ratios": ratios})
    head = "rows per expert", *(f"{name}, ms" for name in makers), *(f"{FLOAT} / {name}" for name in others)
    print(tabulate(body, head, "github", disable_numparse=True))
    name = instructions_of(kernel)
    print(f"{name}, {args.threads} thread(s), {args.experts} experts of {args.model_dim} x {args.hidden_dim}")
    if args.output is not None:
        shape = {"experts": args.experts, "model_dim": args.model_dim, "hidden_dim": args.hidden_dim}
        write_json(args.output, {"instructions": name, "threads": args.threads, **shape, "figures": figures})


if __name__ == "__main__":
    main()
