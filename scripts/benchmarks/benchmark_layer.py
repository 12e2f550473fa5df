#!/usr/bin/env python3
"""Time one MoE layer: dynamic and static gating, fairscale's layer, and the floor of the machine, in one process.

    python scripts/benchmarks/benchmark_layer.py --tokens 1024 --experts 64 --capacity-fraction 1.0 --output layer.json
    python scripts/benchmarks/benchmark_layer.py --experts 128 --model-dim 512 --hidden-dim 2048 --capacity-factor 1.0
    python scripts/benchmarks/benchmark_layer.py --device cuda --dtype float16 --shape nllb-54b --tokens 64 1024 8192 \
        --kernel auto loop --cuda-graph

The floor is `dense` (the same arithmetic without routing: two linear products and the activation over T * K rows) plus
`weights` (one read of the active experts' weights); on a GPU the larger of the two. All are measured in turn, round
after round, and outputs are checked equal before the clock starts: static against fairscale's, and dynamic against
static at a capacity fraction of 1, where nothing drops, or where that does not fit in memory against a loop over
experts. `products` is the dynamic layer without the C kernel for few rows per expert (CPU only), `graph` the one
captured as a CUDA graph. TFLOP/s counts the arithmetic, GB/s the active experts' weights, each over the time that all
of it took. With --capacity-factor the dynamic layer under every overflow rule takes static's and fairscale's place: as
a whole (`drop`) and the rule alone (`drop: rule`), what it costs.

Legend: T = tokens, E = experts, K = choices, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch comes in; the memory profiler is talkative

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from device_timing import add_device, captured, check_device, default_dtype, measure, peak_bytes  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.atomic_file import write_json  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.experts.resident import ResidentExperts  # noqa: E402
from fairseq_moe_ext.gating import MOELayer, Top1Gate, Top2Gate  # noqa: E402
from fairseq_moe_ext.gating.capacity import DROP_METRICS, OVERFLOWS, Capacity, CapacityRules  # noqa: E402
from fairseq_moe_ext.gating.limit import Limit  # noqa: E402
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for  # noqa: E402
from fairseq_moe_ext.gating.static import assign_slots, dense_combine_weights, static_capacity  # noqa: E402
from fairseq_moe_ext.kernels import crossing, loop  # noqa: E402
from fairseq_moe_ext.kernels.choice import KERNELS  # noqa: E402
from fairseq_moe_ext.serving.free_memory import free_bytes  # noqa: E402

# published layers, with static gating's capacity there
SHAPES = {
    "lm-52b": {"experts": 512, "model_dim": 1024, "hidden_dim": 4096, "capacity_fraction": 0.05},
    "nllb-54b": {"experts": 128, "model_dim": 2048, "hidden_dim": 8192, "capacity_fraction": 1.0},
}
NUMBERS = (("tflop_per_second", ".3f"), ("gb_per_second", ".1f"), ("share_of_floor", ".0%"))
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


def build_layers(args: argparse.Namespace) -> tuple[MOELayer, MOELayer]:
    """A dynamic and a static layer that share gate and experts, made on the device: no copy passes through the host."""
    torch.manual_seed(args.seed)
    with torch.device(args.device), default_dtype(getattr(torch, args.dtype)):
        if args.top_k == 1:
            gate = Top1Gate(args.model_dim, args.experts, use_fp32=True)
        else:
            gate = Top2Gate(args.model_dim, args.experts, use_fp32=True, second_expert_policy="all")
        experts = ResidentExperts(args.experts, args.model_dim, args.hidden_dim)
    experts.use_kernel(args.kernel[0])
    dynamic = MOELayer(gate, experts).eval()
    static = MOELayer(gate, experts, dispatcher_for("static", StaticOptions(args.capacity_fraction))).eval()
    for layer in (dynamic, static):
        layer.prepare_for_serving(args.seed)
    return dynamic, static


class _FairscaleGate(torch.nn.Module):
    """Our gate's masks in the form that fairscale's layer asks for."""

    def __init__(self, layer: MOELayer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor):
        gate, options = self.layer.gate, self.layer.dispatcher.options
        routing = gate(tokens)
        capacity = static_capacity(
            tokens.size(0), routing.num_experts, routing.expert_ids.size(1), options.capacity_fraction, False
        )
        slots = assign_slots(routing)
        routing = routing.keep_only(slots < capacity)
        weights = gate.combine_weights(routing)
        dense = dense_combine_weights(routing, slots, weights, capacity).to(tokens.dtype)
        return tokens.new_zeros(()), dense, dense.bool()


class _Expert(torch.nn.Module):
    """One of our experts as a module, sharing its weights."""

    def __init__(self, experts: ResidentExperts, number: int):
        super().__init__()
        self.weights = [weights[number] for weights in experts.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = self.weights
        return F.linear(F.relu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def fairscale_layer(layer: MOELayer) -> Callable[[Tensor], Tensor]:
    """fairscale's MOELayer in a process group of one; x (B, L, D) -> (B, L, D)."""
    from fairscale.nn.moe import MOELayer as FairscaleMOELayer  # heavy: only where it is asked for

    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    experts = torch.nn.ModuleList(_Expert(layer.experts, number) for number in range(layer.experts.num_experts))
    return FairscaleMOELayer(_FairscaleGate(layer), experts).eval()


def with_kernel(layer: MOELayer, kernel: str) -> MOELayer:
    """The same layer, its experts run by `kernel`."""
    other = copy.copy(layer)
    other._modules = {**layer._modules, "experts": copy.copy(layer.experts)}
    other.experts.use_kernel(kernel)
    return other


def without_c_kernel(call: Callable[[], Tensor]) -> Tensor:
    """`call` with PyTorch's own products alone."""
    with patch.object(loop, "most_rows", lambda *_: 0):
        return call()


def static_bytes(args: argparse.Namespace, tokens: int, fraction: float) -> int:
    """What static gating takes at its peak: three (T, E, C) tensors of float32, and the rows of all slots."""
    capacity = static_capacity(tokens, args.experts, args.top_k, fraction, False)
    itemsize = getattr(torch, args.dtype).itemsize
    slots = args.experts * capacity
    return 12 * tokens * slots + itemsize * slots * (2 * args.model_dim + args.hidden_dim)


def _fits(call: Callable[[], Tensor]) -> bool:
    """Whether a GPU has the memory for `call`."""
    try:
        call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def implementations(
    args: argparse.Namespace, dynamic: MOELayer, static: MOELayer, tokens: int
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """What is timed, by name, its outputs compared; and the bytes of the active experts' weights."""
    dtype, device = getattr(torch, args.dtype), args.device
    torch.manual_seed(args.seed + 1)
    x = torch.randn(tokens, 1, args.model_dim, device=device).to(dtype)
    rows = x.new_empty(tokens * args.top_k, args.model_dim).normal_()
    experts = dynamic.experts
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (weights[0].detach().clone() for weights in experts.parameters())
    active = len(dynamic.gate(x[:, 0]).expert_ids.unique())
    weights = x.new_empty(active * experts.expert_bytes // dtype.itemsize).uniform_()
    found = {"dynamic": lambda: dynamic(x)}
    for kernel in args.kernel[1:]:
        found[kernel] = lambda layer=with_kernel(dynamic, kernel): layer(x)
    if crossing.most_rows(dtype, x.device) > 0:
        found["products"] = lambda: without_c_kernel(lambda: dynamic(x))
    if args.cuda_graph and experts.kernel_for(x.device, x.dtype) == "loop":
        print("graph is left out: a loop over experts waits for the host")
    elif args.cuda_graph:
        found["graph"] = captured(found["dynamic"])
    found |= {
        "static": lambda: static(x),
        "dense": lambda: F.linear(F.relu(F.linear(rows, fc1_weight, fc1_bias)), fc2_weight, fc2_bias),
        "weights": lambda: torch.sum(weights),
    }
    free = free_bytes(torch.device(device))
    needed = static_bytes(args, tokens, args.capacity_fraction)
    if needed > free or not _fits(found["static"]):
        print(f"static is left out: its mask and slots take about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
        del found["static"]
    elif tokens % args.experts:
        print(f"fairscale is left out: its layer wants tokens ({tokens}) in multiples of experts ({args.experts})")
    elif device == "cpu" and dtype == torch.float32:  # all that fairscale's layer computes in on a CPU
        fairscale = fairscale_layer(static)
        found["fairscale"] = lambda: fairscale(x)
    if 2 * static_bytes(args, tokens, 1.0) < free:
        expected = MOELayer(static.gate, static.experts, dispatcher_for("static", StaticOptions(1.0))).eval()(x)
    else:
        expected = with_kernel(dynamic, "loop")(x)
    tolerance = {"atol": TOLERANCE[args.dtype], "rtol": TOLERANCE[args.dtype]}
    for name in {"dynamic", "products", "graph", *args.kernel[1:]} & found.keys():
        torch.testing.assert_close(found[name](), expected, **tolerance)
    if "fairscale" in found:
        torch.testing.assert_close(found["fairscale"](), found["static"](), **tolerance)
    return found, weights.nbytes


def capacities(args: argparse.Namespace, dynamic: MOELayer, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The layer without a capacity and under each overflow rule, and the rules alone, by name."""
    x = torch.randn(tokens, 1, args.model_dim, device=args.device).to(getattr(torch, args.dtype))
    routing = dynamic.gate(x[:, 0])
    weights = dynamic.gate.combine_weights(routing).to(x.dtype)
    ranks = torch.zeros(tokens, dtype=torch.int64, device=args.device)
    found = {"dynamic": lambda: dynamic(x)}
    for overflow in OVERFLOWS:
        rules = CapacityRules(args.capacity_factor, overflow, args.drop_metric)
        capacity = Capacity(rules, [0] * args.experts, 1)
        layer = MOELayer(dynamic.gate, dynamic.experts, rules=[Limit(capacity)]).eval()
        layer.prepare_for_serving(args.seed)
        found[overflow] = lambda layer=layer: layer(x)
        found[f"{overflow}: rule"] = lambda capacity=capacity: capacity.apply(routing, weights, ranks).weights
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="a published layer: experts, dims, capacity fraction")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024], help="T, one or more")
    parser.add_argument("--experts", type=positive, default=64, help="E")
    parser.add_argument("--model-dim", type=positive, default=256, help="D")
    parser.add_argument("--hidden-dim", type=positive, default=1024, help="F")
    parser.add_argument("--top-k", type=int, default=2, choices=(1, 2), help="K")
    parser.add_argument("--capacity-fraction", type=float, default=1.0, help="static gating's slots per expert / T")
    parser.add_argument("--capacity-factor", type=float, metavar="G", help="time overflow rules at this gamma")
    parser.add_argument("--drop-metric", default="score", choices=DROP_METRICS, help="who stays")
    parser.add_argument(
        "--kernel", nargs="+", default=["auto"], choices=KERNELS, help="of the dynamic layer; more are timed beside it"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="time the dynamic layer as a CUDA graph as well")
    parser.add_argument("--threads", type=positive, default=1)
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="measure every number of tokens at least so long")
    parser.add_argument("--seed", type=int, default=1)
    shape, _ = parser.parse_known_args()
    if shape.shape is not None:
        parser.set_defaults(**SHAPES[shape.shape])
    args = parser.parse_args()
    if args.capacity_factor is not None and not args.capacity_factor > 0:
        parser.error(f"--capacity-factor must be above 0, got {args.capacity_factor}")
    if args.cuda_graph and args.device == "cpu":
        parser.error("--cuda-graph needs --device cuda, got cpu")
    check_device(args, parser)
    return args


def report(
    args: argparse.Namespace, tokens: int, found: dict[str, Callable[[], Tensor]], weight_bytes: int
) -> list[dict]:
    """Measure at so many tokens and print a table -> per implementation its figures."""
    times = measure(found, args.seconds, args.device)
    median = {name: statistics.median(values) for name, values in times.items()}
    parts = [median[name] for name in ("dense", "weights") if name in median]
    floor = (sum(parts) if args.device == "cpu" else max(parts)) if parts else None
    operations = 4 * tokens * args.top_k * args.model_dim * args.hidden_dim
    results = []
    for name, call in found.items():
        result = {
            "tokens": tokens,
            "implementation": name,
            "median_ms": median[name],
            "spread_ms": max(times[name]) - min(times[name]),
            "peak_bytes": peak_bytes(call, args.device),
        }
        if floor and name != "weights":
            result["tflop_per_second"] = operations / median[name] / 1e9
        if floor and name != "dense":
            result["gb_per_second"] = weight_bytes / median[name] / 1e6
        if floor:
            result["share_of_floor"] = floor / median[name]
        results.append(result)
    head = ("", "median ms", "spread ms", "x floor", "x dynamic", "TFLOP/s", "GB/s", "of floor", "peak MB")
    body = []
    for result in results:
        value = result["median_ms"]
        body.append((
            result["implementation"], f"{value:.2f}", f"{result['spread_ms']:.2f}",
            f"{value / floor:.2f}" if floor else "", f"{value / median['dynamic']:.4f}",
            *(_number(result, *each) for each in NUMBERS), f"{result['peak_bytes'] / 1e6:.1f}",
        ))
    print(tabulate(body, head, "plain", disable_numparse=True, colalign=["left"] + ["right"] * (len(head) - 1)))
    if floor:
        print(f"floor (dense {'+' if args.device == 'cpu' else 'or'} weights): {floor:.2f} ms")
    print(f"{len(times['dynamic'])} rounds, {args.threads} thread(s)", flush=True)
    return results


def _number(result: dict, name: str, form: str) -> str:
    return format(result[name], form) if name in result else ""


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    results = []
    dynamic, static = build_layers(args)
    for tokens in args.tokens:
        if len(args.tokens) > 1:
            print(f"\n{tokens} tokens")
        weight_bytes = 0
        if args.capacity_factor is None:
            found, weight_bytes = implementations(args, dynamic, static, tokens)
        else:
            found = capacities(args, dynamic, tokens)
        results += report(args, tokens, found, weight_bytes)
        if args.output is not None:  # after every number of tokens: one that fails does not lose the others
            write_json(args.output, results, "--output")
    print(f"kernel: {dynamic.experts.kernel_for(torch.device(args.device), getattr(torch, args.dtype))}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
