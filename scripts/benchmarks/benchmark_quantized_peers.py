#!/usr/bin/env python3
"""Our int8 and int4 experts beside ggml's, kt-kernel's and PyTorch's, our dense int8 layers beside CTranslate2's.

    python scripts/benchmarks/benchmark_quantized_peers.py --environments FOLDER
    python scripts/benchmarks/benchmark_quantized_peers.py --quick     # ours and PyTorch's alone, small

ggml is what llama-cpp-python brings, which compiles for a quarter of an hour. Each peer is installed into a virtual
environment of its own in FOLDER once, and is a process that stays alive; calls go round, one of each in turn, at one
number of rows after another. Every expert gets the same number of rows; a time is one expert's: fc1, relu, fc2. Ratios
are a peer's time over ours in the same round, of the same bits, medians over the rounds: above 1 ours is faster.
Outputs are checked against float32's first. CTranslate2's time is the difference of two encoders
(peers/ctranslate2_layers.py says of which), scaled to all hidden features.

Legend: E = experts, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from peers.environments import (  # noqa: E402
    CTRANSLATE2,
    KT_KERNEL,
    LLAMA_CPP,
    ROOT,
    EnvironmentMissing,
    main_environment,
    virtual_environment,
)
from peers.process import Peer, prepare, rounds  # noqa: E402
from peers.table import ratio  # noqa: E402

from fairseq_moe_ext.atomic_file import write_json, write_text  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from reproduction.report import cpu_name  # noqa: E402

ROWS = (1, 4, 16, 48)
SECONDS = 40.0
OURS = "our_experts.py"
PEERS = {
    "ggml": ("ggml_experts.py", LLAMA_CPP),
    "kt-kernel": ("kt_experts.py", KT_KERNEL),
    "ctranslate2": ("ctranslate2_layers.py", CTRANSLATE2),
}
NARROW_DIM = 64  # as peers/ctranslate2_layers.py has it
WHOLE, NARROW, DENSE = "CTranslate2, whole", "CTranslate2, narrow", "CTranslate2 int8 dense"


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "quantized_peers.log"
    log.unlink(missing_ok=True)
    environments, left_out = {OURS: main_environment(args.threads)}, {}
    for name in [] if args.quick else args.peers:
        script, requirements = PEERS[name]
        try:
            environments[script] = virtual_environment(requirements, args.environments, args.threads)
        except EnvironmentMissing as error:
            left_out[name] = str(error)
    dims = (2, 64, 128) if args.quick else (args.experts, args.model_dim, args.hidden_dim)
    case = dict(zip(("experts", "model_dim", "hidden_dim"), dims, strict=True), seed=args.seed, rows=list(args.rows))
    tables = []
    with ExitStack() as stack:
        peers = {script: stack.enter_context(Peer(script, its, log)) for script, its in environments.items()}
        answers = {script: prepare(peer, case) for script, peer in peers.items()}
        for answer in answers.values():
            left_out |= answer["left_out"]
        if not answers[OURS]["calls"]:
            raise SystemExit(f"ours cannot be timed: {left_out}")
        for count in tqdm(args.rows, disable=not sys.stderr.isatty()):
            calls = {
                call.split("|")[0]: partial(peers[script].seconds, call)
                for script, answer in answers.items()
                for call in answer["calls"]
                if call.endswith(f"|{count}")
            }
            taken = rounds(calls, args.seconds / len(args.rows), lambda _share: None)
            tables += [{"rows": count, **row} for row in figures(taken, case)]
    facts = {script: answer["facts"] for script, answer in answers.items()}
    content = {"cpu": cpu_name(), "threads": args.threads, **case, "facts": facts, "left_out": left_out}
    write_json(args.output / "quantized_peers.json", {**content, "figures": tables})
    text = markdown(content, tables)
    write_text(args.output / "quantized_peers.md", text)
    print(text)


def figures(taken: dict[str, list[float]], case: dict) -> list[dict]:
    """Per implementation the median milliseconds of one expert, by what part of ours it is compared with, and how often
    it takes our time: the median over the rounds, and its quarters."""
    taken = {name: [1000 * each / case["experts"] for each in seconds] for name, seconds in taken.items()}
    if WHOLE in taken:
        scale = case["hidden_dim"] / (case["hidden_dim"] - NARROW_DIM)
        both = zip(taken.pop(WHOLE), taken.pop(NARROW), strict=False)
        taken[DENSE] = [scale * (whole - narrow) for whole, narrow in both]
    rows = []
    for name, its in taken.items():
        ours = taken[compared_with(name)]
        ratios = sorted(one / other for one, other in zip(its, ours, strict=False))
        row = {"implementation": name, "milliseconds": statistics.median(its), "times_ours": ratio(its, ours)}
        rows.append({**row, "quarters": statistics.quantiles(ratios, n=4)[::2], "calls": len(its)})
    return rows


def compared_with(name: str) -> str:
    """Ours of as many bits."""
    if name.startswith("ours"):
        return "ours, float32"
    if name == DENSE:
        return "ours, int8 dense"
    return "ours, int8" if "int8" in name or "Q8" in name else "ours, int4"


def markdown(content: dict, figures: list[dict]) -> str:
    """A line per implementation; per number of rows its milliseconds and how often it takes ours, with quarters."""
    cells: dict[str, list[str]] = {}
    for row in figures:
        cell = "{milliseconds:.2f} | {times_ours:.2f} ({quarters[0]:.2f} to {quarters[1]:.2f})".format(**row)
        cells.setdefault(row["implementation"], []).extend(cell.split(" | "))
    body = [(name, compared_with(name), *its) for name, its in cells.items()]
    head = ["implementation", "beside", *(f"{count}: {what}" for count in content["rows"] for what in ("ms", "times"))]
    lines = [
        "{cpu}, {threads} thread(s), {experts} experts of {model_dim} x {hidden_dim}, seed {seed}".format(**content),
        *(f"{script.removesuffix('.py')}: {its['instructions']}" for script, its in content["facts"].items() if its),
        "",
        tabulate(body, head, "github", disable_numparse=True),
        "",
        *(f"left out: {name}: {why}" for name, why in content["left_out"].items()),
    ]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="the folder of the peers' virtual environments, kept")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="beside ours and PyTorch's")
    parser.add_argument("--experts", type=positive, default=4, help="E; their int4 weights should not fit the cache")
    parser.add_argument("--model-dim", type=positive, default=2048, help="D, a multiple of 256")
    parser.add_argument("--hidden-dim", type=positive, default=8192, help="F, a multiple of 256")
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="rows per expert")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all rounds together")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="ours and PyTorch's alone, small")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "peers", help="the tables' folder")
    args = parser.parse_args()
    if not args.quick and args.environments is None:
        parser.error("--environments FOLDER is needed, or --quick")
    if not args.seconds > 0:
        parser.error(f"--seconds must be above 0, got {args.seconds}")
    for name in ("model_dim", "hidden_dim"):
        if getattr(args, name) % 256:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of 256, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
