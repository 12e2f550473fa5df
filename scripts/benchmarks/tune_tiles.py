#!/usr/bin/env python3
"""Time the Triton kernels of one layer's experts by tile sizes, beside those that are chosen by default.

    python scripts/benchmarks/tune_tiles.py --shape nllb-54b --tokens 256 1024 8192 --dtype float16 --output tiles.json

What is measured belongs into `tiles_for` (kernels/triton_mlp.py). Where there is no GPU, TRITON_INTERPRET=1 runs
the kernels on the CPU, which says whether they run and nothing about their time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from benchmark_layer import SHAPES  # noqa: E402
from device_timing import add_device, check_device, measure  # noqa: E402
from tqdm import tqdm  # noqa: E402
from triton.runtime.errors import TritonError  # noqa: E402

from fairseq_moe_ext.atomic_file import write_json  # noqa: E402
from fairseq_moe_ext.experts.parts import packed_shapes  # noqa: E402
from fairseq_moe_ext.gating.plan import plan_by_expert  # noqa: E402
from fairseq_moe_ext.gating.routing import Routing  # noqa: E402
from fairseq_moe_ext.kernels.triton_mlp import Tiles, run_triton, shared_memory, tiles_for  # noqa: E402

NUM_CHOICES = 2
# rows, columns, inner, warps, stages; each takes a second or two to compile
CANDIDATES = (
    (16, 32, 128, 4, 4),
    (16, 64, 64, 4, 4),
    (16, 64, 128, 4, 3),
    (16, 64, 128, 4, 4),
    (16, 64, 256, 4, 3),
    (16, 128, 64, 4, 4),
    (16, 128, 128, 4, 3),
    (16, 128, 128, 8, 3),
    (32, 64, 128, 4, 4),
    (32, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 128, 64, 8, 4),
    (64, 256, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
)


def candidates(rows_per_expert: float, itemsize: int, memory: int) -> list[Tiles]:
    """The default tiles, then those that fit the shared memory and are near the rows that an expert has."""
    default = tiles_for(rows_per_expert, itemsize, memory)
    others = [Tiles(*sizes) for sizes in CANDIDATES]
    near = [
        tiles
        for tiles in others
        if (tiles.rows + tiles.columns) * tiles.inner * itemsize * tiles.stages <= memory
        and tiles.rows <= max(32, 2 * rows_per_expert)
        and (rows_per_expert <= 4 * tiles.rows or tiles.rows >= 128)
    ]
    return [default] + [tiles for tiles in near if tiles != default]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="nllb-54b", help="a published layer")
    parser.add_argument("--experts", type=int, help="E; default: the shape's, as the two below")
    parser.add_argument("--model-dim", type=int, help="D")
    parser.add_argument("--hidden-dim", type=int, help="F")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 8192], help="T, one or more")
    add_device(parser, "cuda", "float16")
    parser.add_argument("--seconds", type=float, default=0.05, help="measure each at least so long")
    parser.add_argument("--most", type=int, default=1000, help="try no more tiles than so many")
    args = parser.parse_args()
    check_device(args, parser)
    for name in ("experts", "model_dim", "hidden_dim"):
        if getattr(args, name) is None:
            setattr(args, name, SHAPES[args.shape][name])
    return args


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), args.device
    shapes = packed_shapes(args.experts, args.model_dim, args.hidden_dim).values()
    parameters = [torch.empty(shape, dtype=dtype, device=device).uniform_(-0.03, 0.03) for shape in shapes]
    memory = shared_memory(torch.device(device))
    results = []
    for tokens in args.tokens:
        x = torch.randn(tokens, args.model_dim, device=device).to(dtype)
        probabilities = torch.rand(tokens, args.experts, device=device)
        weights, expert_ids = probabilities.topk(NUM_CHOICES, dim=1)
        kept = torch.ones_like(expert_ids, dtype=torch.bool)
        plan = plan_by_expert(Routing(expert_ids, kept, weights, probabilities), weights)
        rows, outputs = x[plan.token_ids], torch.empty(len(plan.token_ids), args.model_dim, dtype=dtype, device=device)
        found = candidates(tokens * NUM_CHOICES / args.experts, dtype.itemsize, memory)[: args.most]
        times: dict[Tiles, float] = {}
        for tiles in tqdm(found, desc=f"{tokens} tokens", disable=None):
            try:
                def call(tiles=tiles, rows=rows, plan=plan, outputs=outputs):
                    run_triton(rows, plan.offsets, None, parameters, F.relu, outputs, tiles=tiles)

                call()  # compiles
                times[tiles] = statistics.median(measure({"": call}, args.seconds, device, least=3)[""])
            except (RuntimeError, TritonError) as error:  # too much of some resource
                tqdm.write(f"{tiles}: {str(error).splitlines()[0]}")
        for tiles in sorted(times, key=times.get)[:8]:
            print(f"{tokens} tokens: {times[tiles]:.3f} ms with {tiles}{'  (default)' if tiles == found[0] else ''}")
        results += [
            {"tokens": tokens, "milliseconds": value, "default": tiles == found[0], **vars(tiles)}
            for tiles, value in times.items()
        ]
        if args.output is not None:
            write_json(args.output, results, "--output")


if __name__ == "__main__":
    main()
