"""Time and memory of calls on a CPU or a GPU, for the benchmarks."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from fairseq_moe_ext.atomic_file import refuse_unwritable  # noqa: E402
from reproduction import memory_peak  # noqa: E402

BURST = 0.2  # seconds
DTYPES = ("float32", "float16", "bfloat16")


def add_device(parser: argparse.ArgumentParser, device: str = "cpu", dtype: str = "float32") -> None:
    """--device, --dtype and --output, which `check_device` checks."""
    parser.add_argument("--dtype", default=dtype, choices=DTYPES)
    parser.add_argument("--device", default=device, help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")


def check_device(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu where PyTorch finds no GPU, got {args.device}")
    if args.output is not None:
        refuse_unwritable(parser, "--output", args.output)


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure(
    found: dict[str, Callable[[], Tensor]], seconds: float, device: str, least: int = 5
) -> dict[str, list[float]]:
    """Milliseconds per call, all in turn, at least so many rounds and then as many as `seconds` allow.

    In a round a short call is repeated for BURST seconds, so that it has a median of its own beside long ones.
    """
    times: dict[str, list[float]] = {name: [] for name in found}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(values) < least for values in times.values()):
        for name, call in found.items():
            burst = time.perf_counter() + BURST
            while True:
                synchronize(device)
                start = time.perf_counter()
                call()
                synchronize(device)
                times[name].append(1000 * (time.perf_counter() - start))
                if time.perf_counter() >= burst:
                    break
    return times


def peak_bytes(call: Callable[[], Tensor], device: str) -> int:
    """The most memory that one call's tensors took at a time, in bytes, above what was there before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    return memory_peak.peak_bytes(call)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` as a CUDA graph, which the host starts at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
