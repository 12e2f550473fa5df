#!/usr/bin/env python3
"""Time one MoE layer: dynamic and static gating, fairscale's layer, and the floor of the machine, in one process.

    python scripts/benchmark_layer.py --tokens 1024 --experts 64 --capacity-fraction 1.0 --output layer.json
    python scripts/benchmark_layer.py --experts 128 --model-dim 512 --hidden-dim 2048 --capacity-factor 1.0

The floor is `dense` (the same arithmetic without routing: two linear products and the activation over T * K rows) plus
`weights` (one read of the active experts' weights); on a GPU the larger of the two. All are measured in turn, round
after round, and outputs are checked equal before the clock starts: static against fairscale's, and dynamic against
static at a capacity fraction of 1, where nothing drops. With --capacity-factor the dynamic layer under every overflow
rule takes static's and fairscale's place: as a whole (`drop`) and the rule alone (`drop: rule`), what it costs.

Legend: T = tokens, E = experts, K = choices, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch comes in; the memory profiler is talkative

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_moe_ext.gating import MOELayer, ResidentExperts, Top1Gate, Top2Gate  # noqa: E402
from fairseq_moe_ext.gating.capacity import DROP_METRICS, OVERFLOWS, Capacity, CapacityRules  # noqa: E402
from fairseq_moe_ext.gating.dispatch import plan_dispatch  # noqa: E402
from fairseq_moe_ext.gating.layer import StaticOptions  # noqa: E402
from fairseq_moe_ext.gating.static import assign_slots, dense_combine_weights, static_capacity  # noqa: E402


def build_layers(args: argparse.Namespace) -> tuple[MOELayer, MOELayer]:
    """A dynamic and a static layer that share gate and experts."""
    torch.manual_seed(args.seed)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    if args.top_k == 1:
        gate = Top1Gate(args.model_dim, args.experts, use_fp32=True)
    else:
        gate = Top2Gate(args.model_dim, args.experts, use_fp32=True, second_expert_policy="all")
    experts = ResidentExperts(args.experts, args.model_dim, args.hidden_dim)
    dynamic = MOELayer(gate, experts).to(**options).eval()
    static = MOELayer(gate, experts, "static", StaticOptions(args.capacity_fraction)).eval()
    for layer in (dynamic, static):
        layer.prepare_for_serving(args.seed)
    return dynamic, static


class _FairscaleGate(torch.nn.Module):
    """Our gate's masks in the form that fairscale's layer asks for."""

    def __init__(self, layer: MOELayer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor):
        gate, options = self.layer.gate, self.layer.static
        routing = gate(tokens)
        capacity = static_capacity(
            tokens.size(0), routing.num_experts, routing.expert_ids.size(1), options.capacity_fraction, False
        )
        slots = assign_slots(routing)
        routing = routing.keep_only(slots < capacity)
        weights = gate.combine_weights(routing, routing.weights.dtype)
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


def implementations(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name; outputs have been compared."""
    dynamic, static = build_layers(args)
    dtype, device = getattr(torch, args.dtype), args.device
    x = torch.randn(args.tokens, 1, args.model_dim, device=device).to(dtype)
    rows = x.new_empty(args.tokens * args.top_k, args.model_dim).normal_()
    experts = dynamic.experts
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (weights[0].detach().clone() for weights in experts.parameters())
    plan = plan_dispatch(dynamic.gate(x[:, 0]))
    active = sum(count > 0 for count in plan.tokens_per_expert)
    per_expert = sum(weights[0].numel() for weights in experts.parameters())
    weights = torch.rand(active * per_expert, device=device).to(dtype)
    found = {
        "dynamic": lambda: dynamic(x),
        "static": lambda: static(x),
        "dense": lambda: F.linear(F.relu(F.linear(rows, fc1_weight, fc1_bias)), fc2_weight, fc2_bias),
        "weights": lambda: torch.sum(weights),
    }
    if args.tokens % args.experts:
        print(f"fairscale is left out: its layer wants tokens ({args.tokens}) in multiples of experts ({args.experts})")
    elif device == "cpu":
        fairscale = fairscale_layer(static)
        found["fairscale"] = lambda: fairscale(x)
    tolerance = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}[args.dtype]
    expected = found["static"]()
    if "fairscale" in found:
        torch.testing.assert_close(found["fairscale"](), expected, atol=tolerance, rtol=tolerance)
    if args.capacity_fraction >= 1:
        torch.testing.assert_close(found["dynamic"](), expected, atol=tolerance, rtol=tolerance)
    else:
        whole = MOELayer(static.gate, static.experts, "static", StaticOptions(1.0)).eval()
        torch.testing.assert_close(found["dynamic"](), whole(x), atol=tolerance, rtol=tolerance)
    return found


def capacities(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The layer without a capacity and under each overflow rule, and the rules alone, by name."""
    dynamic, _ = build_layers(args)
    x = torch.randn(args.tokens, 1, args.model_dim, device=args.device).to(getattr(torch, args.dtype))
    routing = dynamic.gate(x[:, 0])
    weights = dynamic.gate.combine_weights(routing, x.dtype)
    ranks = torch.zeros(args.tokens, dtype=torch.int64, device=args.device)
    found = {"dynamic": lambda: dynamic(x)}
    for overflow in OVERFLOWS:
        layer = MOELayer(dynamic.gate, dynamic.experts).eval()
        rules = CapacityRules(args.capacity_factor, overflow, args.drop_metric)
        layer.capacity = capacity = Capacity(rules, [0] * args.experts, 1)
        layer.prepare_for_serving(args.seed)
        found[overflow] = lambda layer=layer: layer(x)
        found[f"{overflow}: rule"] = lambda capacity=capacity: capacity.apply(routing, weights, ranks).weights
    return found


def measure(found: dict[str, Callable[[], Tensor]], seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds per call, all in turn, at least 5 rounds and then as many as `seconds` allow."""
    times: dict[str, list[float]] = {name: [] for name in found}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["dynamic"]) < 5:
        for name, call in found.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def peak_bytes(call: Callable[[], Tensor], device: str) -> int:
    """The most memory that one call's tensors took at a time, in bytes, above what was there before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="T")
    parser.add_argument("--experts", type=int, default=64, help="E")
    parser.add_argument("--model-dim", type=int, default=256, help="D")
    parser.add_argument("--hidden-dim", type=int, default=1024, help="F")
    parser.add_argument("--top-k", type=int, default=2, choices=(1, 2), help="K")
    parser.add_argument("--capacity-fraction", type=float, default=1.0, help="static gating's slots per expert / T")
    parser.add_argument("--capacity-factor", type=float, metavar="G", help="time overflow rules at this gamma")
    parser.add_argument("--drop-metric", default="score", choices=DROP_METRICS, help="who stays")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=20.0, help="measure at least so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    for name in ("tokens", "experts", "model_dim", "hidden_dim", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.capacity_factor is not None and not args.capacity_factor > 0:
        parser.error(f"--capacity-factor must be above 0, got {args.capacity_factor}")
    if args.output is not None and not args.output.resolve().parent.is_dir():
        parser.error(f"--output must name a file in an existing folder, got {args.output}")
    return args


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    found = implementations(args) if args.capacity_factor is None else capacities(args)
    times = measure(found, args.seconds, args.device)
    results = [
        {
            "implementation": name,
            "median_ms": statistics.median(times[name]),
            "spread_ms": max(times[name]) - min(times[name]),
            "peak_bytes": peak_bytes(call, args.device),
        }
        for name, call in found.items()
    ]
    median = {result["implementation"]: result["median_ms"] for result in results}
    parts = [median[name] for name in ("dense", "weights") if name in median]
    floor = (sum(parts) if args.device == "cpu" else max(parts)) if parts else None
    print(f"{'':<14}{'median ms':>12}{'spread ms':>12}{'x floor':>10}{'x dynamic':>11}{'peak MB':>10}")
    for result in results:
        name, value = result["implementation"], result["median_ms"]
        times_floor = f"{value / floor:.2f}" if floor else ""
        print(
            f"{name:<14}{value:>12.2f}{result['spread_ms']:>12.2f}{times_floor:>10}"
            f"{value / median['dynamic']:>11.4f}{result['peak_bytes'] / 1e6:>10.1f}"
        )
    if floor:
        print(f"floor (dense + weights): {floor:.2f} ms")
    print(f"{len(times['dynamic'])} rounds, {args.threads} thread(s)")
    if args.output is not None:
        temporary = Path(f"{args.output}.tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, args.output)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
