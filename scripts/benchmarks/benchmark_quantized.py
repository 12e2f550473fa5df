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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.atomic_file import refuse_unwritable, write_json  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.kernels.block import GROUP, SMALLEST, Block, QuantizedPool  # noqa: E402
from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS, load_kernel  # noqa: E402
from fairseq_moe_ext.kernels.loop import run_loop  # noqa: E402
from fairseq_moe_ext.kernels.offsets import Offsets  # noqa: E402
from fairseq_moe_ext.kernels.quantized import run_quantized  # noqa: E402
from fairseq_moe_ext.kernels.quantized_kernel import instructions_of  # noqa: E402

ROWS = (1, 4, 16, 48)
ROUNDS = 7
FLOAT, INT8, INT4 = "float32", "int8", "int4"
PEERS = {8: "PyTorch int8", 4: "PyTorch int4"}

Call = Callable[[int], object]  # of the rows per expert


def float_experts(args: argparse.Namespace) -> Call:
    experts, dim, hidden = args.experts, args.model_dim, args.hidden_dim
    shapes = (experts, hidden, dim), (experts, hidden), (experts, dim, hidden), (experts, dim)
    pool = [torch.randn(shape) for shape in shapes]
    return lambda count: run_loop(*inputs(args, count), None, pool, F.relu, outputs(args, count), most=ANY_ROWS)


def quantized_experts(args: argparse.Namespace, bits: int) -> Call:
    """Of random codes and scales: what they are makes no difference to the time."""
    block = Block(bits, args.model_dim, args.hidden_dim)
    blocks = torch.randint(0, 256, (args.experts, block.nbytes), dtype=torch.uint8)
    for layer in block.layers(blocks):
        if bits == 8:
            layer.codes.clamp_(SMALLEST[8])
        layer.scales.copy_(torch.rand(layer.scales.shape) + 1)
        layer.units.fill_(2**-10)
        layer.bias.zero_()
    pool = QuantizedPool(block, blocks)
    return lambda count: run_quantized(*inputs(args, count), None, pool, F.relu, outputs(args, count))


def peer_experts(args: argparse.Namespace, bits: int) -> Call | None:
    """None where this PyTorch has no such product for these dims."""
    experts = [[_peer(bits, *dims) for dims in ((args.hidden_dim, args.model_dim), (args.model_dim, args.hidden_dim))]
               for _ in range(args.experts)]

    def run(count: int) -> None:
        rows = torch.randn(count, args.model_dim).bfloat16()
        for fc1, fc2 in experts:
            fc2(fc1(rows).relu_())

    try:
        run(1)
    except (AttributeError, RuntimeError):
        return None
    return run


def _peer(bits: int, features: int, dim: int) -> Callable[[Tensor], Tensor]:
    if bits == 8:
        weight, scales = torch.randint(-127, 128, (features, dim), dtype=torch.int8), torch.rand(features).bfloat16()
        return lambda rows: torch.ops.aten._weight_int8pack_mm(rows, weight, scales)
    codes = torch.randint(0, 16, (features, dim), dtype=torch.int32)
    packed, scales = None, torch.rand(-(-dim // GROUP), features, 2).bfloat16()
    if hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return lambda rows: torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales)


def inputs(args: argparse.Namespace, count: int) -> tuple[Tensor, Offsets]:
    return torch.randn(args.experts * count, args.model_dim), Offsets.of_counts([count] * args.experts)


def outputs(args: argparse.Namespace, count: int) -> Tensor:
    return torch.empty(args.experts * count, args.model_dim)


def times(calls: dict[str, Call], count: int, rounds: int, experts: int) -> dict[str, list[float]]:
    """Milliseconds of one expert, round by round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(count)
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
    calls = {FLOAT: float_experts(args), INT8: quantized_experts(args, 8), INT4: quantized_experts(args, 4)}
    for bits, name in {} if args.no_peers else PEERS.items():
        call = peer_experts(args, bits)
        if call is not None:
            calls[name] = call
    others = list(calls)[1:]
    body, figures = [], []
    with torch.no_grad():
        for count in tqdm(args.rows, disable=not sys.stderr.isatty()):
            found = times(calls, count, args.rounds, args.experts)
            middle = {name: statistics.median(its) for name, its in found.items()}
            ratios = {name: statistics.median(a / b for a, b in zip(found[FLOAT], found[name], strict=True))
                      for name in others}
            numbers = *(middle[name] for name in calls), *(ratios[name] for name in others)
            body.append((count, *(f"{number:.2f}" for number in numbers)))
            figures.append({"rows": count, "milliseconds": middle, "ratios": ratios})
    head = "rows per expert", *(f"{name}, ms" for name in calls), *(f"{FLOAT} / {name}" for name in others)
    print(tabulate(body, head, "github", disable_numparse=True))
    name = instructions_of(kernel)
    print(f"{name}, {args.threads} thread(s), {args.experts} experts of {args.model_dim} x {args.hidden_dim}")
    if args.output is not None:
        shape = {"experts": args.experts, "model_dim": args.model_dim, "hidden_dim": args.hidden_dim}
        write_json(args.output, {"instructions": name, "threads": args.threads, **shape, "figures": figures})


if __name__ == "__main__":
    main()
