#!/usr/bin/env python3
"""Quality and time under a capacity: every gamma, overflow rule and metric, on the quickstart's models or your own.

    python scripts/reproduce_capacity_aware.py                                     # what examples/quickstart.sh made
    python scripts/reproduce_capacity_aware.py --checkpoint model.pt --data data-bin --flags "-s en -t de"

Quality (perplexity; BLEU and chrF) comes from one process that counts its capacity as RANKS virtual ranks would, and
the modelled latency from the same runs: in every pass a layer takes as long as its busiest rank, and a rank as long as
it has assignments. The time of a layer is measured by RANKS processes over gloo, each with as large a batch.
--output gets capacity.csv, capacity.md, capacity.png and runs/, whose finished runs are reused.

Legend: R = ranks.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import shlex
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sacrebleu
import torch
from capacity_figures import Row, write_figures
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fairseq import options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq_cli import eval_lm, generate  # noqa: E402

from fairseq_moe_ext.balancing.placement import contiguous  # noqa: E402
from fairseq_moe_ext.gating.capacity import DROP_METRICS, OVERFLOWS  # noqa: E402
from fairseq_moe_ext.models import moe_transformer, moe_transformer_lm  # noqa: E402, F401
from fairseq_moe_ext.serving.checkpoint_summary import summarize  # noqa: E402
from fairseq_moe_ext.serving.errors import CheckpointError  # noqa: E402
from fairseq_moe_ext.serving.report import write_json  # noqa: E402
from fairseq_moe_ext.tasks import (  # noqa: E402, F401
    moe_language_modeling,
    moe_translation,
    moe_translation_multi_simple_epoch,
)
from fairseq_moe_ext.trace import load_trace  # noqa: E402

QUICKSTART = ROOT / "examples" / "output"
LM_FLAGS = "--task moe_language_modeling --tokens-per-sample 128"
MT_FLAGS = "--task moe_translation --beam 4 --max-len-a 1.5 --max-len-b 5"


@dataclass(frozen=True)
class Model:
    """A checkpoint, its data, and the flags of the command that serves it; `rows`: the batch of R ranks together."""

    name: str
    checkpoint: Path
    data: Path
    flags: tuple[str, ...]
    translates: bool
    rows: int


@dataclass(frozen=True)
class Setting:
    """What is done with the overflow; gamma None: no capacity."""

    gamma: float | None = None
    overflow: str = "drop"
    metric: str = "score"

    def __str__(self) -> str:
        return "no-capacity" if self.gamma is None else f"{self.overflow}-{self.metric}-{self.gamma:g}"

    def flags(self, virtual_ranks: int) -> list[str]:
        if self.gamma is None:
            return []
        rules = ["--moe-overflow", self.overflow, "--moe-drop-metric", self.metric]
        return ["--moe-capacity-factor", str(self.gamma), *rules, "--moe-virtual-ranks", str(virtual_ranks)]


def arguments_of(model: Model, subset: str) -> list[str]:
    """Of the command that serves it."""
    common = ("--path", model.checkpoint, "--gen-subset", subset, "--batch-size", model.rows)
    return [str(part) for part in (model.data, *common, "--cpu", "--num-workers", 0, *model.flags)]


def configuration(arguments: list[str], translates: bool):
    """What fairseq-generate or fairseq-eval-lm makes of its arguments."""
    parser = options.get_generation_parser() if translates else options.get_eval_lm_parser()
    if translates:
        parser.add_argument("--arch", "-a", default="wav2vec2")  # as fairseq_cli.generate has it
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))


def remembered(file: Path, identity: dict, run) -> dict:
    """What `run()` gave, from `file` where that is of the same `identity`."""
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return known["result"]
    result = run()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"identity": identity, "result": result})
    return result


def identity_of(model: Model, arguments: list[str], ranks: int) -> dict:
    """What a finished run must have in common with the one that is wanted."""
    stat = model.checkpoint.stat() if model.checkpoint.is_file() else None
    return {"arguments": arguments, "ranks": ranks, "file": stat and [stat.st_size, stat.st_mtime_ns]}


def serve(model: Model, arguments: list[str], ranks: int) -> dict:
    """One process's run -> its quality, and from report and trace what its capacity did."""
    with tempfile.TemporaryDirectory() as folder:
        report, trace = Path(folder) / "report.json", Path(folder) / "trace.npz"
        arguments = [*arguments, "--moe-report", str(report), "--moe-trace", str(trace), "--log-format", "none"]
        cfg = configuration(arguments, model.translates)
        if model.translates:
            output = io.StringIO()
            generate._main(cfg, output)
            quality = translation_quality(output.getvalue())
        else:
            quality = {"perplexity": 2 ** float(eval_lm.main(cfg)["loss"])}
        return {**quality, **work(json.loads(report.read_text()), load_trace(trace), ranks)}


def translation_quality(lines: str) -> dict[str, float]:
    """BLEU (13a) and chrF of fairseq-generate's lines."""
    texts: dict[str, dict[str, str]] = {"T": {}, "H": {}}
    for line in lines.splitlines():
        kind, _, rest = line.partition("-")
        if kind in texts:
            number, *_, text = rest.split("\t")
            texts[kind][number] = text
    hypotheses, references = [texts["H"][number] for number in texts["T"]], [list(texts["T"].values())]
    bleu = sacrebleu.corpus_bleu(hypotheses, references, force=True).score
    return {"bleu": bleu, "chrf": sacrebleu.corpus_chrf(hypotheses, references).score}


def work(report: dict, trace: dict, ranks: int) -> dict[str, float]:
    """Of all layers and passes: what became of the assignments, and the busiest expert's and rank's load.

    largest_expert: its load over the mean load that the gate's choices would give an expert; largest_rank: the same of
    a rank, which is how long the modelled layer takes over how long an even one would without a capacity.
    """
    layers = report["layers"]
    total = sum(layer["assignments"] for layer in layers)
    busiest_expert = busiest_rank = 0
    for phase in trace.values():
        num_experts = phase.load.shape[2]
        rank_of = np.array([places[0] for places in contiguous(num_experts, ranks)])
        per_rank = np.stack([phase.load[:, :, rank_of == rank].sum(axis=2) for rank in range(ranks)], axis=2)
        busiest_expert += int(phase.load.max(axis=2).sum(dtype=np.int64)) * num_experts
        busiest_rank += int(per_rank.max(axis=2).sum(dtype=np.int64)) * ranks
    return {
        "dropped_fraction": sum(layer.get("dropped_fraction", 0) * layer["assignments"] for layer in layers) / total,
        "dropped": sum(layer["dropped"] for layer in layers) / total,
        "rerouted": sum(layer["rerouted"] for layer in layers) / total,
        "largest_expert": busiest_expert / total,
        "largest_rank": busiest_rank / total,
    }


def measure(model: Model, arguments: list[str], settings: list[Setting], ranks: int) -> dict[str, float]:
    """Milliseconds of a MoE layer's call by `ranks` processes over gloo, by setting."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        request = {"arguments": arguments, "translates": model.translates, "output": str(output)}
        request["settings"] = [list(asdict(setting).values()) for setting in settings]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = Path(__file__).with_name("capacity_layer_time.py")
        command = [sys.executable, *launcher, str(script), json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(output.read_text())


def study(model: Model, args: argparse.Namespace, bar: tqdm) -> list[Row]:
    """All settings of one model, the one without a capacity first."""
    settings = [Setting()] + [
        Setting(gamma, overflow, metric) for overflow in OVERFLOWS for metric in DROP_METRICS for gamma in args.gammas
    ]
    folder, arguments = args.output / "runs" / model.name, arguments_of(model, args.subset)
    bar.set_description(f"{model.name} on {args.ranks} ranks")
    file, identity = folder / "layer-times.json", identity_of(model, [*arguments, *map(str, settings)], args.ranks)
    times = remembered(file, identity, lambda: measure(model, arguments, settings, args.ranks))
    bar.update()
    rows = []
    for setting in settings:
        bar.set_description(f"{model.name} {setting}")
        whole = arguments + setting.flags(args.ranks)
        file, identity = folder / f"{setting}.json", identity_of(model, whole, args.ranks)
        found = remembered(file, identity, lambda whole=whole: serve(model, whole, args.ranks))
        rows.append(Row(model.name, **asdict(setting), **found, layer_ms=times[str(setting)]))
        bar.update()
    return rows


def find_models(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Model]:
    if (args.checkpoint is None) != (args.data is None):
        parser.error("--checkpoint (CHECKPOINT) and --data (DATA) must be given together")
    if args.checkpoint is not None:
        folders = {args.checkpoint.stem: (args.checkpoint, args.data)}
    else:
        names = ("language_modeling", "translation")
        folders = {name: (QUICKSTART / name / "model.pt", QUICKSTART / name / "data-bin") for name in names}
        if missing := [path for path, _ in folders.values() if not path.is_file()]:
            parser.error(f"there is no {missing[0]}: run `bash examples/quickstart.sh` first, or name a model of yours")
    models = []
    for name, (checkpoint, data) in folders.items():
        try:
            translates = bool(summarize(str(checkpoint)).layers.get("encoder"))
        except CheckpointError as error:
            parser.error(str(error))
        flags, rows = (MT_FLAGS, 64) if translates else (LM_FLAGS, 8)
        flags = (*shlex.split(flags), *shlex.split(args.flags))
        models.append(Model(name, checkpoint, data, flags, translates, args.batch_size or rows))
    return models


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="instead of the quickstart's models")
    parser.add_argument("--data", type=Path, help="its binarised data")
    parser.add_argument("--flags", default="", help="more flags of the command that serves it, as one string")
    parser.add_argument("--subset", default="test", help="--gen-subset (test)")
    parser.add_argument("--batch-size", type=int, help="sentences or blocks of all ranks together (64; LM: 8)")
    parser.add_argument("--ranks", type=int, default=4, help="R (4)")
    parser.add_argument("--gammas", type=float, nargs="+", default=[2.0, 1.5, 1.0, 0.5], metavar="G")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "capacity_aware", help="folder")
    args = parser.parse_args(arguments)
    for name in ("ranks", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not min(args.gammas) > 0:
        parser.error(f"--gammas must be above 0, got {min(args.gammas):g}")
    models = find_models(args, parser)
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # fairseq's lines would tear the progress bar
    warnings.simplefilter("ignore")
    runs = 2 + len(OVERFLOWS) * len(DROP_METRICS) * len(args.gammas)
    with tqdm(total=len(models) * runs, unit="run") as bar:
        rows = [row for model in models for row in study(model, args, bar)]
    args.output.mkdir(parents=True, exist_ok=True)
    print(write_figures(args.output, rows, args.ranks))
    print(f"capacity.csv, capacity.md and capacity.png are in {args.output}")


if __name__ == "__main__":
    main()
