#!/usr/bin/env python3
"""How fast `fairseq-moe quantize` is, as a share of what the disk can do: reading the source and writing the result.

    python scripts/benchmarks/measure_quantizing.py --folder scratch                       # takes 5 GB of disk
    python scripts/benchmarks/measure_quantizing.py --folder scratch --rounds 3 --sources float16 --experts int4

A slice of a model with random weights, by default of NLLB-54B's expert dims, in a shared file and rank files. In every
round, by turns: the source is read and a file of the result's size written, by plain calls; and the command does it,
in a process of its own whose imports are not counted. The page cache has nothing of the source before either reads it,
where the system lets its pages go; whatever is written is on the disk in the end (fsync). The share is the seconds of
the plain calls over the command's. What was written is removed in the end.

Legend: D = model dim, F = hidden dim.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from fairseq_moe_ext.atomic_file import new_file, write_json  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.experts.formats import QUANTIZED  # noqa: E402
from fairseq_moe_ext.experts.parts import EXPERT_KEYS  # noqa: E402

SOURCES = ("float32", "float16")
AT_ONCE = 1 << 20
COMMAND = """
import sys, time
from fairseq_moe_ext.command_line.quantize import main
start = time.perf_counter()
code = main(sys.argv[1:])
print(time.perf_counter() - start, time.process_time())
sys.exit(code)
"""


def write_source(folder: Path, dtype: torch.dtype, args: argparse.Namespace) -> list[Path]:
    """A decoder's one MoE layer: X-shared.pt and rank files."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    prefix, dim, hidden = "decoder.layers.0", args.model_dim, args.hidden_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)

    dense = {"decoder.embed_tokens.weight": normal(args.vocabulary, dim)}
    dense[f"{prefix}.moe_layer.gate.wg.weight"] = normal(args.files * args.experts_a_file, dim)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        dense[f"{prefix}.self_attn.{name}.weight"] = normal(dim, dim)
    shapes = dict(zip(EXPERT_KEYS.values(), ((hidden, dim), (hidden,), (dim, hidden), (dim,)), strict=True))
    content = {"args": None, "cfg": {"model": {"_name": "transformer_lm"}}, "optimizer_history": [{}]}
    content |= {"criterion": None, "task_state": {}, "extra_state": {}}
    files = [folder / "X-shared.pt", *(folder / f"X-rank-{rank}.pt" for rank in range(args.files))]
    for file in files:
        model = dense if file is files[0] else {
            f"{prefix}.moe_layer.experts.{number}.{key}": normal(*shape)
            for number in range(args.experts_a_file) for key, shape in shapes.items()
        }  # fmt: skip
        with new_file(file) as opened:
            torch.save({**content, "model": model}, opened)
    os.sync()
    return files


def drop_from_page_cache(files: list[Path]) -> None:
    """As far as the system lets them go."""
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(files: list[Path]) -> float:
    """From the disk, one after the other."""
    drop_from_page_cache(files)
    buffer, start = bytearray(AT_ONCE), time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def seconds_to_write(file: Path, size: int) -> float:
    """To the disk, in a file that has its room."""
    piece, start = os.urandom(AT_ONCE), time.perf_counter()
    with open(file, "wb", buffering=0) as opened:
        os.posix_fallocate(opened.fileno(), 0, size)
        for first in range(0, size, AT_ONCE):
            opened.write(piece[: size - first])
        os.fsync(opened.fileno())
    found = time.perf_counter() - start
    file.unlink()
    return found


def seconds_to_quantize(files: list[Path], target: Path, experts: str) -> tuple[float, float, int]:
    """Of the command, its CPU seconds with imports, and the bytes of what it wrote, which is gone again."""
    drop_from_page_cache(files)
    source = files[0].with_name("X.pt")
    options = ["--output", str(target), "--experts", experts, "--dense", "int8"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(source), *options], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    size = target.stat().st_size
    target.unlink()
    seconds, cpu = map(float, done.stdout.splitlines()[-1].split())
    return seconds, cpu, size


def measure(files: list[Path], experts: str, rounds: int) -> dict:
    """Medians over the rounds."""
    target = files[0].with_name("quantised.safetensors")
    _, _, size = seconds_to_quantize(files, target, experts)  # warms up what is imported
    found: dict[str, list[float]] = {name: [] for name in ("read", "write", "command", "cpu", "share")}
    for _ in range(rounds):
        read, write = seconds_to_read(files), seconds_to_write(target, size)
        command, cpu, _ = seconds_to_quantize(files, target, experts)
        for name, value in zip(found, (read, write, command, cpu, (read + write) / command), strict=True):
            found[name].append(value)
    row = {name: statistics.median(values) for name, values in found.items()}
    row |= {"least_share": min(found["share"]), "greatest_share": max(found["share"])}
    return {**row, "source_bytes": sum(file.stat().st_size for file in files), "target_bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure, with room for some GB")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--experts", nargs="+", choices=tuple(QUANTIZED), default=tuple(QUANTIZED))
    parser.add_argument("--rounds", type=positive, default=5)
    for name, value in (("model-dim", 2048), ("hidden-dim", 8192), ("files", 4), ("experts-a-file", 6)):
        parser.add_argument(f"--{name}", type=positive, default=value, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=positive, default=8192)
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    results = []
    for source in args.sources:
        folder = args.folder / source
        files = write_source(folder, getattr(torch, source), args)
        try:
            for experts in args.experts:
                results.append({"source": source, "experts": experts, **measure(files, experts, args.rounds)})
                print(table(results[-1:]), flush=True)
        finally:
            shutil.rmtree(folder)
    print(table(results))
    if args.output is not None:
        write_json(args.output, results, "--output")


def table(rows: list[dict]) -> str:
    """As Markdown."""
    head = ("source, GB", "result, GB", "disk reads, s", "disk writes, s", "command, s", "of the disk's rate")
    body = [
        (
            f"{row['source']}, {row['source_bytes'] / 1e9:.2f}",
            f"{row['experts']}, {row['target_bytes'] / 1e9:.2f}",
            f"{row['read']:.2f}", f"{row['write']:.2f}", f"{row['command']:.2f}",
            f"{row['share']:.0%} ({row['least_share']:.0%} to {row['greatest_share']:.0%})",
        )
        for row in rows
    ]  # fmt: skip
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
