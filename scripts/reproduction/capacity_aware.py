"""Quality and time under a capacity: every gamma, overflow rule and metric, on the quickstart's models or your own.

    bash scripts/reproduce_capacity_aware.sh                                       # what examples/quickstart.sh made
    CHECKPOINT=model.pt DATA=data-bin FLAGS="-s en -t de" bash scripts/reproduce_capacity_aware.sh

Quality (perplexity; BLEU and chrF) comes from one process that counts its capacity as RANKS virtual ranks would, and
the modelled latency from the same runs: in every pass a layer takes as long as its busiest rank, and a rank as long as
it has assignments. The time of a layer is measured by RANKS processes over gloo, each with as large a batch.
--output gets capacity.csv, capacity.md, capacity.png and runs/, whose finished runs are reused.

Legend: R = ranks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fairseq_moe_ext.balancing.placement import contiguous
from fairseq_moe_ext.gating.capacity import DROP_METRICS, OVERFLOWS
from reproduction.capacity_figures import Row, write_figures
from reproduction.models import Model, arguments_of
from reproduction.runs import identity_of, remembered, run_command, serve
from reproduction.study import BATCH_SIZE, Option, Study, run_study


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


def serve_capped(model: Model, arguments: list[str], ranks: int) -> dict:
    """One process's run -> its quality, and from report and trace what its capacity did."""
    found = serve(model, arguments)
    return {**found.quality, **work(found.report, found.trace, ranks)}


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
        command = [sys.executable, *launcher, "-m", "reproduction.capacity_layer_time", json.dumps(request)]
        run_command(command)
        return json.loads(output.read_text())


def study_model(model: Model, study: Study, bar: tqdm) -> list[Row]:
    """All settings of one model, the one without a capacity first."""
    args = study.args
    settings = [Setting()] + [
        Setting(gamma, overflow, metric) for overflow in OVERFLOWS for metric in DROP_METRICS for gamma in args.gammas
    ]
    folder, arguments = study.runs / model.name, arguments_of(model, args.subset)
    bar.set_description(f"{model.name} on {args.ranks} ranks")
    file, identity = folder / "layer-times.json", identity_of(model, [*arguments, *map(str, settings)], args.ranks)
    times = remembered(file, identity, lambda: measure(model, arguments, settings, args.ranks))
    bar.update()
    rows = []
    for setting in settings:
        bar.set_description(f"{model.name} {setting}")
        whole = arguments + setting.flags(args.ranks)
        file, identity = folder / f"{setting}.json", identity_of(model, whole, args.ranks)
        found = remembered(file, identity, lambda whole=whole: serve_capped(model, whole, args.ranks))
        rows.append(Row(model.name, **asdict(setting), **found, layer_ms=times[str(setting)]))
        bar.update()
    return rows


def make(study: Study) -> str:
    runs = 2 + len(OVERFLOWS) * len(DROP_METRICS) * len(study.args.gammas)
    with tqdm(total=len(study.models) * runs, unit="run") as bar:
        rows = [row for model in study.models for row in study_model(model, study, bar)]
    return write_figures(study.output, rows, study.args.ranks)


def main(arguments: Sequence[str] | None = None) -> int:
    batch = replace(BATCH_SIZE, help="sentences or blocks of all ranks together (64; LM: 8)")
    ranks = Option("ranks", "R (4)", 4, metavar="R", least=1)
    gammas = Option("gammas", "2.0 1.5 1.0 0.5", [2.0, 1.5, 1.0, 0.5], float, many=True, metavar="G", above=0)
    return run_study("capacity_aware", __doc__, make, arguments, [batch, ranks, gammas], stem="capacity")
