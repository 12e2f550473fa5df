#!/usr/bin/env python3
"""Time the real commands end to end, fairseq-generate and fairseq-eval-lm: static, dynamic, and a dense model beside.

    python scripts/benchmarks/benchmark_generate.py                        # the published shapes, scaled down
    python scripts/benchmarks/benchmark_generate.py --models mt --variants dynamic continuous --batch-size 8
    python scripts/benchmarks/benchmark_generate.py --models mt --device cuda --dtype float16
    python scripts/benchmarks/benchmark_generate.py --checkpoint model.pt --data data-bin --flags "-s en -t de"

Every run is a process of its own, whose figures are its --moe-report's; variants run in turn, round after round.
`dense` is the model of the same active size (a feed-forward of hidden dim K * F in place of the experts), the floor of
a command. Static gating, which takes long, serves one batch of a made model, the others --batches. Published one-node
ratios of dynamic over static: LM 6.21, MT encoder 5.75, MT decoder 2.58 ("Toward Efficient Inference for Mixture of
Experts", largest throughputs on 8 V100).
--output gets benchmark_generate.json and benchmark_generate.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from made_models import SHAPES, scaled_vocabulary, write_checkpoint, write_data  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fairseq_moe_ext.atomic_file import write_json, write_text  # noqa: E402
from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize  # noqa: E402
from fairseq_moe_ext.checkpoints.errors import CheckpointError  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from reproduction.tables import markdown  # noqa: E402

VARIANTS = {
    "static": ("--moe-gating", "static"),
    "dynamic": ("--moe-gating", "dynamic"),
    "continuous": ("--moe-gating", "dynamic", "--continuous-batching"),
    "dense": (),
}
SIDES = ("encoder", "decoder")
FRACTION = "--moe-eval-capacity-token-fraction"


@dataclass
class Model:
    """What is served: the arguments of each variant's command, without the variant's own flags."""

    name: str
    translates: bool
    arguments: dict[str, list[str]]
    runs: dict[str, list[dict]] = field(default_factory=dict)


def made_model(name: str, args: argparse.Namespace, folder: Path) -> Model:
    """A model of a published shape and its data, written to `folder`."""
    shape, dim, layers = SHAPES[name], args.model_dim, args.layers
    vocabulary = scaled_vocabulary(shape, dim, layers)
    rows = args.batch_size or (48 if shape.translates else 8)
    data = write_data(folder / f"{name}-data", shape, vocabulary, {"test": rows * args.batches, "short": rows})
    files = {"moe": write_checkpoint(folder / f"{name}.pt", data, shape, dim, layers, args.dtype)}
    if "dense" in args.variants:
        files["dense"] = write_checkpoint(folder / f"{name}-dense.pt", data, shape, dim, layers, args.dtype, dense=True)
    if shape.translates:
        flags = ["--task", "moe_translation", "-s", "en", "-t", "de", "--beam", str(args.beam), "--quiet"]
        flags += ["--max-len-b", str(args.max_len), "--min-len", str(args.max_len)]
    else:
        flags = ["--task", "moe_language_modeling", "--tokens-per-sample", "128"]
    flags += ["--batch-size", str(rows), "--gen-subset"]
    static = ["short", FRACTION, str(shape.capacity_fraction)]
    arguments = {
        variant: [str(data), "--path", str(files["dense" if variant == "dense" else "moe"]), *flags]
        + (static if variant == "static" else ["test"])
        for variant in args.variants
        if shape.translates or variant != "continuous"
    }
    title = f"{shape.name}'s shape: model dim {dim}, {layers} layers{' each' if shape.translates else ''}"
    title += f", {vocabulary:,} words; batch {rows}"
    if shape.translates:
        title += f", beam {args.beam}, {args.max_len + 1} steps"
    return Model(title, shape.translates, arguments)


def own_model(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Model:
    """The user's checkpoint under the user's flags."""
    try:
        translates = bool(summarize(str(args.checkpoint)).layers.get("encoder"))
    except CheckpointError as error:
        parser.error(str(error))
    flags = ["--task", "moe_translation" if translates else "moe_language_modeling", "--gen-subset", "test"]
    arguments = [str(args.data), "--path", str(args.checkpoint), *flags, *shlex.split(args.flags)]
    without = list(arguments)  # dynamic gating refuses static gating's capacity
    if FRACTION in without:
        place = without.index(FRACTION)
        del without[place : place + 2]
    variants = [name for name in args.variants if name != "dense" and (translates or name != "continuous")]
    chosen = {variant: arguments if variant == "static" else without for variant in variants}
    return Model(args.checkpoint.name, translates, chosen)


def serve(model: Model, variant: str, args: argparse.Namespace) -> dict:
    """One process's run -> the figures of its report, and seconds: of the whole, and of its loop as it says itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", f"fairseq_cli.{'generate' if model.translates else 'eval_lm'}"]
        command += [*model.arguments[variant], *VARIANTS[variant], "--user-dir", str(ROOT / "fairseq_moe_ext")]
        command += ["--moe-report", str(report), "--num-workers", "0", "--log-format", "none"]
        command += ["--moe-dtype", args.dtype, *(["--cpu"] if args.device == "cpu" else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
        found = json.loads(report.read_text())
    layers = found["layers"]
    own_words = re.search(r"(?:Translated|Evaluated) .* in ([0-9.]+)s", done.stderr)
    return {
        **{side: found[side] for side in SIDES if side in found},
        "command_seconds": seconds,
        "loop_seconds": float(own_words.group(1)),
        "device": found["device"],
        "dtype": found["dtype"],
        "memory": found["memory"],
        "active_experts_mean": statistics.mean(layer["active_experts_mean"] for layer in layers) if layers else None,
        "dropped": sum(layer["dropped"] for layer in layers) / max(sum(layer["assignments"] for layer in layers), 1),
    }


def speeds(model: Model, side: str) -> dict[str, list[float]]:
    """Tokens per second of one stack, by variant, round by round."""
    return {variant: [run[side]["tokens_per_second"] for run in runs] for variant, runs in model.runs.items()}


def table(model: Model) -> str:
    """Medians of one model's variants, and ratios to static and to the dense model, as Markdown."""
    sides = [side for side in SIDES if side in next(iter(model.runs.values()))[0]]
    found = {side: speeds(model, side) for side in sides}
    medians = {side: {name: statistics.median(each) for name, each in found[side].items()} for side in sides}
    head = ["variant", *(f"{side} tok/s" for side in sides)]
    for base in ("static", "dense"):
        head += [f"{side} / {base}" for side in sides if base in model.runs]
    head += ["decoder steps", "tokens in a step", "loop s", "command s", "peak memory", "experts active", "dropped"]
    body = []
    for variant, runs in model.runs.items():
        cells = [variant, *(f"{medians[side][variant]:,.0f}" for side in sides)]
        for base in ("static", "dense"):
            if base in model.runs:
                ratios = (medians[side][variant] / medians[side][base] for side in sides)
                cells += ["" if variant == base else f"{ratio:.2f}" for ratio in ratios]
        last = runs[-1]
        bytes_key = "peak_device_bytes" if last["device"] != "cpu" else "peak_rss_bytes"
        active = last["active_experts_mean"]
        cells += [
            f"{last['decoder']['steps']:,}",
            f"{last['decoder']['tokens'] / last['decoder']['steps']:.1f}",
            *(f"{statistics.median(run[f'{part}_seconds'] for run in runs):.1f}" for part in ("loop", "command")),
            f"{max(run['memory'][bytes_key] for run in runs) / 1e6:,.0f} MB",
            "" if active is None else f"{active:.1f}",
            "" if active is None else f"{last['dropped']:.1%}",
        ]
        body.append(cells)
    return f"**{model.name}**\n\n{markdown(head, body)}"


def write_figures(models: list[Model], args: argparse.Namespace) -> str:
    """Both files of the rounds so far; returns the Markdown."""
    where = f"{torch.cuda.get_device_name()}" if args.device == "cuda" else f"{args.threads} CPU thread(s)"
    rounds = len(next(iter(models[0].runs.values())))
    where += f", {args.dtype}, torch {torch.__version__}, medians of {rounds}"
    text = "\n\n".join([f"`{shlex.join(['python', *sys.argv])}` ({where})", *map(table, models)]) + "\n"
    figures = {"where": where, "models": [{"name": model.name, "runs": model.runs} for model in models]}
    write_json(args.output / "benchmark_generate.json", figures)
    write_text(args.output / "benchmark_generate.md", text)
    return text


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="lm mt")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=["static", "dynamic", "dense"])
    parser.add_argument("--repetitions", type=positive, default=3, help="rounds of all variants (3)")
    parser.add_argument("--model-dim", type=positive, default=128, help="D of the made models, a multiple of 64 (128)")
    parser.add_argument("--layers", type=positive, default=4, help="of each stack, a multiple of 4 (4)")
    parser.add_argument("--batch-size", type=positive, help="sentences or blocks (MT 48, LM 8, as the paper)")
    parser.add_argument("--batches", type=positive, default=4, help="batches that a made model serves (4)")
    parser.add_argument("--beam", type=positive, default=4)
    parser.add_argument("--max-len", type=positive, default=6, help="tokens of every translation of a made model (6)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny, one round: whether it runs")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of yours instead of the made models")
    parser.add_argument("--data", type=Path, help="its binarised data")
    parser.add_argument("--flags", default="", help="more flags of the command that serves it, as one string")
    parser.add_argument("--work", type=Path, help="folder in which to make the models; default: a temporary one")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder")
    args = parser.parse_args()
    if args.quick:
        args.repetitions, args.model_dim, args.batch_size, args.batches, args.max_len = 1, 64, 2, 1, 3
    if args.model_dim % 64:
        parser.error(f"--model-dim must be a multiple of 64, got {args.model_dim}")
    if args.layers % 4:
        parser.error(f"--layers must be a multiple of 4, so that there are MoE layers, got {args.layers}")
    if (args.checkpoint is None) != (args.data is None):
        parser.error("--checkpoint (CHECKPOINT) and --data (DATA) must be given together")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where PyTorch finds no GPU, got cuda")
    return args, parser


def main() -> None:
    args, parser = parse_arguments()
    logging.disable(logging.WARNING)  # fairseq's lines would tear the progress bar
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        if args.checkpoint is not None:
            models = [own_model(args, parser)]
        else:
            names = tqdm(args.models, desc="making models", unit="model")
            models = [made_model(name, args, Path(folder)) for name in names]
        args.output.mkdir(parents=True, exist_ok=True)
        with tqdm(total=args.repetitions * sum(len(model.arguments) for model in models), unit="run") as bar:
            for _ in range(args.repetitions):
                for model in models:
                    for variant in model.arguments:
                        bar.set_description(f"{model.name.partition(':')[0]} {variant}")
                        model.runs.setdefault(variant, []).append(serve(model, variant, args))
                        bar.update()
                text = write_figures(models, args)  # whoever stops it keeps the rounds that are done
    print(text)
    print(f"benchmark_generate.json and benchmark_generate.md are in {args.output}")


if __name__ == "__main__":
    main()
