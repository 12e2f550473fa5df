#!/usr/bin/env python3
"""Where one MoE layer's time goes, by its own clock: gate, dispatch, experts, combine, and the whole call.

    OMP_NUM_THREADS=1 python scripts/benchmarks/measure_parts.py

Top-2 over random tokens; medians in microseconds, of calls that nobody observes for the whole call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.experts.resident import ResidentExperts  # noqa: E402
from fairseq_moe_ext.gating import MOELayer, Top2Gate  # noqa: E402

SHAPES = ((1, 8, 64, 64), (64, 8, 64, 64), (64, 128, 512, 2048), (1024, 512, 256, 1024))
PARTS = ("gate", "dispatch", "experts", "combine")


def measure(shape: tuple[int, ...], seconds: float) -> list[float]:
    """Microseconds of every part, then of the whole call."""
    tokens, experts, model_dim, hidden_dim = shape
    torch.manual_seed(0)
    gate = Top2Gate(model_dim, experts, use_fp32=True, second_expert_policy="all")
    layer = MOELayer(gate, ResidentExperts(experts, model_dim, hidden_dim)).eval()
    layer.prepare_for_serving(1)
    x = torch.randn(tokens, 1, model_dim)
    layer(x)
    whole, told, end = [], [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        layer.observe(None)
        start = time.perf_counter()
        layer(x)
        whole.append(time.perf_counter() - start)
        layer.observe(told.append)
        layer(x)
    return [1e6 * statistics.median(each.seconds[part] for each in told) for part in PARTS] + [
        1e6 * statistics.median(whole)
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=positive, nargs=4, action="append", metavar=("T", "E", "D", "F"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape")
    parser.add_argument("--threads", type=positive, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = args.shape or SHAPES
    body = [
        [", ".join(map(str, shape)), *(f"{each:,.0f}" for each in measure(shape, args.seconds))] for shape in shapes
    ]
    print(tabulate(body, ("tokens, experts, dims", *PARTS, "whole call"), "github", disable_numparse=True))


if __name__ == "__main__":
    main()
