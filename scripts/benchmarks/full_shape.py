#!/usr/bin/env python3
"""A published shape at its full size with random weights, as a quantised checkpoint, served by the real commands.

    python scripts/benchmarks/full_shape.py --shape nllb-54b --folder full            # 30.6 GB on disk
    python scripts/benchmarks/full_shape.py --shape nllb-54b --folder pair --experts 24 --buffer 0
    python scripts/benchmarks/full_shape.py --shape lm-52b --folder full_lm
    python scripts/benchmarks/full_shape.py --folder small --layers 4 --model-dim 64 --experts 8 --vocabulary 500

The file is written straight in the format, experts int4 and dense layers int8, and kept for the next run. Each batch
size is a process of its own: fairseq-generate with sampled hypotheses of `--steps` tokens (a beam search over random
weights would say the same everywhere, and wake the same experts), or fairseq-eval-lm. The file's pages are dropped from
the page cache before each run, where the system lets them go: what is read from disk is read from disk. Routing is
random, the worst case for a buffer.

Legend: E = experts of a layer, D = model dim, F = hidden dim, N = experts of an encoder layer in its buffer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from made_models import BLOCK, SHAPES, Shape, configuration, write_data  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fairseq_moe_ext.atomic_file import write_json  # noqa: E402
from fairseq_moe_ext.checkpoints.quantized_about import INT8_SUFFIX, QuantizedAbout, QuantizedSource  # noqa: E402
from fairseq_moe_ext.checkpoints.quantized_writer import QuantizedWriter  # noqa: E402
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY, is_dense_matrix  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.experts import quantize  # noqa: E402
from fairseq_moe_ext.experts.parts import EXPERT_KEYS  # noqa: E402
from fairseq_moe_ext.kernels.block import GROUP, Block, LinearBlock, QuantizedLinear  # noqa: E402
from fairseq_moe_ext.serving.memory_plan import state_of_architecture  # noqa: E402

NAMES = {"nllb-54b": "mt", "lm-52b": "lm"}
BATCHES = {1: 3, 8: 2}  # how many of so many sentences; of others one
REPOSITORY = Path(__file__).resolve().parents[2]
RANDOM_BYTES = 1 << 28  # drawn once; every block's codes begin somewhere else in them
VERSION = 3.0  # of encoder and decoder: fairseq leaves out the last norm of older ones
STEPS_OF_CODES = {8: 74.0, 4: 4.6}  # standard deviation of codes that are uniform


class RandomBlocks:
    """Blocks of random codes whose weights have the standard deviation 1 / sqrt(K); of what is added to a residual,
    smaller by sqrt(2 * layers), as in deep models: else all tokens grow alike, and choose the same experts."""

    def __init__(self, seed: int, layers: int):
        self._of_residual = 1 / math.sqrt(2 * layers)
        self._generator = torch.Generator().manual_seed(seed)
        self._bytes = torch.randint(0, 256, (RANDOM_BYTES,), dtype=torch.uint8, generator=self._generator)

    def of(self, name: str, block: Block | LinearBlock) -> Tensor:
        """(nbytes,) uint8."""
        target = torch.zeros(1, block.nbytes, dtype=torch.uint8)
        for number, layer in enumerate(block.layers(target)):
            adds = number == 1 or name.endswith((f"out_proj.weight{INT8_SUFFIX}", f"fc2.weight{INT8_SUFFIX}"))
            self._fill(layer, block.bits, self._of_residual if adds else 1.0)
        return target[0]

    def _fill(self, layer: QuantizedLinear, bits: int, gain: float) -> None:
        codes = layer.codes.flatten().view(torch.uint8)
        for first in range(0, len(codes), RANDOM_BYTES // 2):  # no two embeddings are the same
            start = int(torch.randint(0, RANDOM_BYTES // 2, (), generator=self._generator))
            part = codes[first : first + RANDOM_BYTES // 2]
            part.copy_(self._bytes[start : start + len(part)])
        if bits == 8:
            layer.codes.clamp_(min=-127)
        wanted = gain / (math.sqrt(layer.inputs) * STEPS_OF_CODES[bits])
        unit = 2.0 ** math.floor(math.log2(wanted))
        layer.units.fill_(unit)
        layer.scales.fill_(wanted / unit)

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that is not quantised: biases 0, norms 1, fairseq's versions, the rest normal / sqrt(K)."""
        if name.endswith(".version"):
            return torch.full(shape, VERSION)
        if len(shape) < 2:
            return torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0)
        return torch.randn(shape, generator=self._generator) / math.sqrt(shape[-1])


def flags_of_shape(shape: Shape, args: argparse.Namespace) -> list[str]:
    """Of fairseq's trainer: what is not as published."""
    flags = ["--moe-expert-count", str(args.experts)] if args.experts else []
    for side in ("encoder", "decoder") if shape.translates else ("decoder",):
        flags += [f"--{side}-layers", str(args.layers)] if args.layers else []
        if args.model_dim:
            flags += [f"--{side}-embed-dim", str(args.model_dim), f"--{side}-ffn-embed-dim", str(4 * args.model_dim)]
            flags += [f"--{side}-attention-heads", str(max(args.model_dim // 64, 1))]
    return flags


def write_checkpoint(file: Path, data: Path, shape: Shape, args: argparse.Namespace) -> None:
    """The shape with experts in int4 and dense layers in int8."""
    cfg = configuration(data, shape, *flags_of_shape(shape, args))
    cfg = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    cfg = {group: vars(fields) if isinstance(fields, argparse.Namespace) else fields for group, fields in cfg.items()}
    fields = {name: value for name, value in cfg["model"].items() if name not in ("_name", "arch")}
    aliases: dict[str, str] = {}
    blocks: dict[str, Block | LinearBlock] = {}
    floats: dict[str, tuple[int, ...]] = {}
    dims: dict[str, tuple[int, int]] = {}
    first: dict[int, str] = {}
    for name, tensor in state_of_architecture(shape.arch, args.vocabulary, **fields).items():
        size, match = tuple(tensor.shape), EXPERT_KEY.match(name)
        suffix = INT8_SUFFIX if match is None and is_dense_matrix(name, size) else ""
        if first.setdefault(id(tensor), name) != name:
            aliases[name + suffix] = first[id(tensor)] + suffix
        elif suffix:
            blocks[name + suffix], dims[name] = LinearBlock(8, *size), size
        elif match is None:
            floats[name] = size
        elif name.endswith(EXPERT_KEYS["fc1_weight"]):
            prefix, number = match.groups()[:2]
            blocks[f"{prefix}{number}.int4"], dims[prefix] = Block(4, size[1], size[0]), (size[1], size[0])
    updates = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    state = {"args": None, "cfg": cfg, "extra_state": {}, "optimizer_history": [updates], "task_state": {}}
    source = QuantizedSource("0" * 64, (("random weights", 0),), None)
    about = QuantizedAbout("int4", "int8", GROUP, quantize.VERSION, source, None, aliases, dims, state)
    tensors = [(name, torch.uint8, (block.nbytes,)) for name, block in blocks.items()]
    tensors += [(name, torch.float32, size) for name, size in floats.items()]
    files = {each.name: each.read_bytes() for each in sorted(data.glob("dict.*txt"))}
    writer = QuantizedWriter(file, tensors, files, about, f"seed {args.seed}, {tensors}")
    made = RandomBlocks(args.seed, cfg["model"]["decoder_layers"])
    total = sum(math.prod(size) * dtype.itemsize for _, dtype, size in tensors)
    with tqdm(total=total, desc=f"writing {file}", unit="B", unit_scale=True, disable=None) as bar:
        for name in (*blocks, *floats):
            values = made.of(name, blocks[name]) if name in blocks else made.floats(name, floats[name])
            writer.write(name, [values])
            bar.update(values.nbytes)
    writer.complete()


def drop_from_page_cache(file: Path) -> None:
    """As far as the system lets them go."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def serve(file: Path, data: Path, shape: Shape, batch: int, args: argparse.Namespace) -> dict:
    """One command with batches of so many sentences (of a language model: blocks) -> its figures."""
    report = file.with_name(f"report_{batch}.json")
    common = [str(data), "--user-dir", str(REPOSITORY / "fairseq_moe_ext"), "--path", str(file), "--cpu"]
    common += ["--gen-subset", f"batch{batch}", "--batch-size", str(batch), "--moe-report", str(report)]
    common += ["--log-format", "none", *args.flags.split()]
    if args.buffer:
        scope = ["--expert-buffer-scope", "encoder"] if shape.translates else []
        common += ["--expert-buffer-size", str(args.buffer), *scope, "--expert-store", "disk"]
    if shape.translates:
        command, length = "fairseq-generate", str(args.steps - 1)  # the end of a hypothesis is one of its tokens
        common += ["--task", "moe_translation", "-s", "en", "-t", "de", "--sampling"]
        common += ["--beam", str(args.beam), "--nbest", str(args.beam)]
        common += ["--max-len-a", "0", "--max-len-b", length, "--min-len", length]
    else:
        command = "fairseq-eval-lm"
        common += ["--task", "moe_language_modeling", "--tokens-per-sample", str(BLOCK)]
    drop_from_page_cache(file)
    start = time.perf_counter()
    done = subprocess.run([str(Path(sys.executable).with_name(command)), *common], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} {' '.join(common)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    found, batches = json.loads(report.read_text(encoding="utf-8")), BATCHES.get(batch, 1)
    row = {"batch": batch, "command_seconds": time.perf_counter() - start}
    row["loading_seconds"] = found["loading"]["seconds"]
    row["peak_rss_bytes"] = found["memory"]["peak_rss_bytes"]
    row["bytes_read_per_batch"] = sum(layer["bytes_read"] for layer in found["layers"]) / batches
    row["seconds_per_step"] = found["decoder"]["seconds"] / found["decoder"]["steps"]
    row["tokens_per_second"] = found["decoder"]["tokens_per_second"]
    for side in ("encoder", "decoder"):
        layers = [layer["active_experts_mean"] for layer in found["layers"] if layer["name"].startswith(side)]
        row[f"{side}_active_experts"] = sum(layers)
    if "encoder" in found:
        row["seconds_per_encoder_pass"] = found["encoder"]["seconds"] / batches
    return row


def table(rows: list[dict]) -> str:
    """As Markdown."""
    head = ("batch", "encoder pass, s", "read from disk, GB", "step, s", "tokens/s", "experts", "peak, GiB", "load, s")
    lines = [
        (
            row["batch"],
            f"{row['seconds_per_encoder_pass']:.2f}" if "seconds_per_encoder_pass" in row else "",
            f"{row['bytes_read_per_batch'] / 1e9:.2f}",
            f"{row['seconds_per_step']:.3f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['encoder_active_experts']:.0f} + {row['decoder_active_experts']:.0f}",
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
            f"{row['loading_seconds']:.0f}",
        )
        for row in rows
    ]
    return tabulate(lines, head, tablefmt="github", disable_numparse=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=NAMES, default="nllb-54b")
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint, its data and the reports")
    parser.add_argument("--batches", type=positive, nargs="+", default=(1, 8, 32, 64), help="sentences at a time")
    parser.add_argument("--buffer", type=int, default=42, help="experts of each encoder layer in fast memory; 0: all")
    parser.add_argument("--steps", type=positive, default=12, help="tokens of a hypothesis")
    parser.add_argument("--beam", type=positive, default=4)
    parser.add_argument("--source-length", type=positive, default=30, help="tokens of a sentence")
    for name in ("experts", "layers", "model-dim", "vocabulary"):
        parser.add_argument(f"--{name}", type=positive, help="default: as published")
    parser.add_argument("--flags", default="", help="more flags of the command")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    shape = SHAPES[NAMES[args.shape]]
    args.vocabulary = args.vocabulary or shape.vocabulary
    file, data = args.folder / "model.safetensors", args.folder / "data-bin"
    if not data.is_dir():
        lengths = (args.source_length, args.source_length)
        rows = {f"batch{batch}": batch * BATCHES.get(batch, 1) for batch in args.batches}
        write_data(data, shape, args.vocabulary, rows, args.seed, lengths)
    if not file.is_file():
        write_checkpoint(file, data, shape, args)
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB")
    results = []
    for batch in args.batches:
        results.append(serve(file, data, shape, batch, args))
        print(table(results[-1:]), flush=True)
    print(table(results))
    if args.output is not None:
        write_json(args.output, results, "--output")


if __name__ == "__main__":
    main()
