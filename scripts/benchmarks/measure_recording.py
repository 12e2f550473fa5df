#!/usr/bin/env python3
"""What --moe-record costs: CPU seconds with and without it, of one MoE layer and of a translation model.

    OMP_NUM_THREADS=1 python scripts/benchmarks/measure_recording.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/measure_recording.py --model model.pt --data data-bin --text test.en

A layer: top-2 over random tokens; its first calls, in which hidden features are computed again, and the calls after
them. A model: two translations of the text each way, the first of which has the first calls in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.experts.resident import ResidentExperts  # noqa: E402
from fairseq_moe_ext.gating import MOELayer, Top2Gate  # noqa: E402
from fairseq_moe_ext.gating.watched_choices import TOKENS_AT_ONCE  # noqa: E402
from fairseq_moe_ext.recording import MOST_CALLS  # noqa: E402
from fairseq_moe_ext.reporting.recorder import Recorder  # noqa: E402

SHAPES = ((4, 8, 96, 192), (256, 8, 96, 192), (4, 16, 1024, 4096), (256, 16, 1024, 4096))


def seconds_of(run: Callable[[], object]) -> float:
    """CPU seconds, which other programs of a busy machine take none of."""
    start = time.process_time()
    run()
    return time.process_time() - start


def of_layer(shape: tuple[int, ...], calls: int) -> tuple[float, float, float]:
    """CPU seconds of a call: without a record, with it in the first calls (mean), with it later. Of blocks of calls the
    best: a record's own work comes once in many calls."""
    tokens, experts, model_dim, hidden_dim = shape
    torch.manual_seed(0)
    gate = Top2Gate(model_dim, experts, use_fp32=True, second_expert_policy="all")
    layer = MOELayer(gate, ResidentExperts(experts, model_dim, hidden_dim)).eval()
    layer.prepare_for_serving(1)
    x = torch.randn(tokens, 1, model_dim)
    real, entering = torch.ones(tokens, 1, dtype=torch.bool), torch.ones(tokens, 1, dtype=torch.int64)
    layer(x)
    block = 1 + TOKENS_AT_ONCE // tokens

    def best(run: Callable[[], object]) -> float:
        return min(seconds_of(lambda: [run() for _ in range(block)]) for _ in range(max(3, calls // block))) / block

    plain = best(lambda: layer(x))
    recorder = Recorder("", 2, ("", ""))
    recorder.attach({"decoder.layer": layer})

    def recorded() -> None:
        recorder.begin_pass("decoder", 0, entering, real, True)
        layer(x)
        recorder.end_pass()

    first = statistics.mean(seconds_of(recorded) for _ in range(MOST_CALLS))
    return plain, first, best(recorded)


def of_model(model: str, data: str, lines: list[str]) -> list[tuple[float, float]]:
    """CPU seconds of two translations: without and with a record."""
    from fairseq_moe_ext.serving.load import load

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for options in ({}, {"moe_record": str(Path(folder, "record.npz"))}):
            with load(model, data=data, cpu=True, **options) as served:
                served.translate(lines[:2])
                found.append([seconds_of(lambda: served.translate(lines, beam=4)) for _ in range(2)])
    return list(zip(*found, strict=True))


def percent(plain: float, recorded: float) -> str:
    """What it costs."""
    return f"{100 * (recorded / plain - 1):+.1f}%"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=positive, nargs=4, action="append", metavar=("T", "E", "D", "F"))
    parser.add_argument("--calls", type=positive, default=200, help="of each layer")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model:
        lines = Path(args.text).read_text(encoding="utf-8").splitlines()
        body = [[f"{plain:.1f}", percent(plain, more)] for plain, more in of_model(args.model, args.data, lines)]
        print(tabulate(body, ("seconds without", "with a record"), "github", disable_numparse=True))
        return
    body = []
    for shape in args.shape or SHAPES:
        plain, first, later = of_layer(shape, args.calls)
        row = f"{1e6 * plain:,.0f}", percent(plain, first), percent(plain, later)
        body.append([", ".join(map(str, shape)), *row])
    head = ("tokens, experts, dims", "us a call without", f"first {MOST_CALLS} calls", "later")
    print(tabulate(body, head, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
