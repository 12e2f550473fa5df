#!/usr/bin/env python3
"""Time how weights are quantised to int8 and int4: by the C kernel with each of its instructions, and by PyTorch.

    OMP_NUM_THREADS=1 python scripts/benchmarks/benchmark_quantizing.py

All take turns on one matrix, round after round, on one thread; a rate is float32 bytes per second of the thread's own
CPU time, the median over the rounds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.experts.quantize import quantize_linear  # noqa: E402
from fairseq_moe_ext.kernels.block import BITS, LinearBlock  # noqa: E402
from fairseq_moe_ext.kernels.cpu_kernel import INSTRUCTIONS, VARIABLE, load_kernel  # noqa: E402


def rate(weight: torch.Tensor, bits: int, choice: str) -> float:
    """MB/s; choice: of the variable FAIRSEQ_MOE_CPU_KERNEL."""
    os.environ[VARIABLE] = choice
    block = LinearBlock(bits, *weight.shape)
    (layer,) = block.layers(torch.zeros(1, block.nbytes, dtype=torch.uint8))
    start = time.thread_time()
    quantize_linear(layer, weight, None)
    return weight.nbytes / 1e6 / (time.thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=positive, default=512)
    parser.add_argument("--inputs", type=positive, default=8192)
    parser.add_argument("--rounds", type=positive, default=20)
    args = parser.parse_args()
    os.environ.pop(VARIABLE, None)
    kernel = load_kernel()
    known = () if kernel is None else INSTRUCTIONS[: kernel.number + 1]
    torch.set_num_threads(1)
    weight = torch.randn(args.outputs, args.inputs)
    found: dict[tuple[int, str], list[float]] = {(bits, choice): [] for bits in BITS for choice in (*known, "off")}
    for _ in range(args.rounds):
        for (bits, choice), rates in found.items():
            rates.append(rate(weight, bits, choice))
    body = [(f"int{bits}", "PyTorch" if choice == "off" else choice, f"{statistics.median(rates):.0f}",
             f"{min(rates):.0f} to {max(rates):.0f}") for (bits, choice), rates in found.items()]
    print(tabulate(body, ("format", "by", "MB/s, median", "range"), "github", disable_numparse=True))


if __name__ == "__main__":
    main()
