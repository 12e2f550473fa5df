"""What the tests of fairseq's commands under several ranks share: what a run told, and what it must be equal to."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
import torch
from ties import assert_same_generation

from fairseq_moe_ext.balancing.placement import LayerPlacement, contiguous, experts_of_rank
from fairseq_moe_ext.trace import PhaseTrace, load_trace

# as upstream's README.moe.md has them
UPSTREAM = {"world_size": 2, "replication_count": 1, "moe_eval_capacity_token_fraction": 0.05}
UPSTREAM |= {"use_moe_pad_mask": False, "pass_tokens_transformer_layer": False}
AS_UPSTREAM = ("--is-moe", "--distributed-world-size", "2", "--model-overrides", repr(UPSTREAM))
LM_LAYERS = ("decoder.layers.1.moe_layer", "decoder.layers.3.moe_layer")
MT_LAYERS = ("encoder.layers.1.moe_layer", "decoder.layers.1.moe_layer")
FLAGS = {"lm_top2_ws2": commands.LM, "mt_plain": commands.MT, "mt_nllb_ws2": (*commands.NLLB, "-t", "de")}


@dataclass(frozen=True)
class Told:
    """What a run wrote with --moe-report and --moe-trace."""

    report: dict
    trace: dict[str, PhaseTrace]

    @classmethod
    def read(cls, folder: Path) -> Told:
        return cls(json.loads((folder / "report.json").read_text()), load_trace(folder / "trace.npz"))

    def layers(self) -> dict[str, dict]:
        return {layer["name"]: layer for layer in self.report["layers"]}


def telling(folder: Path) -> tuple:
    return ("--moe-report", folder / "report.json", "--moe-trace", folder / "trace.npz")


def arguments_of(goldens: Path, name: str, *flags) -> tuple:
    """Of the command that serves a golden."""
    folder = goldens / name
    return (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *FLAGS[name], *flags)


def loss_of(done) -> tuple[str, str]:
    """(loss, perplexity) of the one line that says so; nothing else is printed, nothing is said twice."""
    ((loss, perplexity),) = re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", done.stderr)
    assert done.stdout == ""
    assert done.stderr.count("served: ") == done.stderr.count("loading model(s)") == 1
    return loss, perplexity


def assert_same_lines(output: str, wanted: commands.Generation) -> None:
    """Every line in one rank's order, ids and texts equal up to ties, scores to 1e-5."""
    found = commands.Generation(output.splitlines())
    assert [line.split("\t")[0] for line in found.lines] == [line.split("\t")[0] for line in wanted.lines]
    assert sum(line.startswith("Generate test with beam=") for line in found.lines) == 1
    assert len(found.of_kind("S")) == 100
    assert [fields for _, fields in found.of_kind("D")] == [fields for _, fields in found.of_kind("H")]
    assert_same_generation(found, wanted, positions=1.1e-4)  # printed to 4 places


def assert_translated_once(done, sentences: int = 100) -> None:
    assert re.findall(r"Translated (\d+) sentences", done.stderr) == [str(sentences)]
    assert done.stderr.count("served: ") == done.stderr.count("loading model(s)") == 1


def assert_same_trace(found: Told, wanted: Told) -> None:
    assert found.trace.keys() == wanted.trace.keys()
    for phase, recorded in wanted.trace.items():
        assert found.trace[phase].names == recorded.names
        assert found.trace[phase].load.tolist() == recorded.load.tolist()
        assert found.trace[phase].batch.tolist() == recorded.batch.tolist()


def assert_report_of_all_ranks(
    found: Told, one: Told, placement: dict[str, LayerPlacement], ranks: int, model_dim: int
) -> None:
    """Under dynamic gating: what one rank did, in parts; the bytes are those of the assignments that leave."""
    report = found.report
    assert report["world_size"] == ranks and [each["rank"] for each in report["ranks"]] == list(range(ranks))
    for totals in {"encoder", "decoder"} & set(one.report):
        for name in {"tokens", "steps"} & set(one.report[totals]):
            assert report[totals][name] == one.report[totals][name]
    assert report.get("generation") == one.report.get("generation")
    for name, layer in found.layers().items():
        alone = one.layers()[name]
        for figure in ("load", "assignments", "dropped", "active_experts_mean"):
            assert layer[figure] == pytest.approx(alone[figure])
        held = [experts_of_rank(placement[name], rank) for rank in range(ranks)]
        assert layer["load_per_rank"] == [sum(layer["load"][expert] for expert in share) for share in held]
        assert layer["bytes_exchanged"] == assignments_that_leave(one, name, held) * model_dim * 4
        assert {"sizes", "exchange", "experts"} <= set(layer["seconds"])
        assert min(layer["seconds"].values()) > 0
    assert sum(each["bytes_exchanged"] for each in report["ranks"]) == sum(
        layer["bytes_exchanged"] for layer in report["layers"]
    )
    assert sum(each["load_share"] for each in report["ranks"]) == pytest.approx(1)
    total = one.report["memory"]["expert_bytes_total"]
    assert report["memory"]["expert_bytes_total"] == report["memory"]["expert_bytes_resident"] == total
    num_layers, num_experts = len(placement), len(next(iter(placement.values())))
    for each in report["ranks"]:
        share = sum(len(experts_of_rank(layer, each["rank"])) for layer in placement.values())
        assert each["expert_bytes"] == total // (num_layers * num_experts) * share
    # rank 0 reads its own experts and what all ranks share, no more
    others = sum(each["expert_bytes"] for each in report["ranks"][1:])
    assert report["loading"]["bytes"] == one.report["loading"]["bytes"] - others


def assignments_that_leave(one: Told, name: str, held: list[tuple[int, ...]]) -> int:
    """Of the trace of one rank, when batch i is rank i % R's."""
    number = 0
    for phase in one.trace.values():
        if name in phase.names:
            loads = phase.load[:, phase.names.index(name)].astype(int)
            for load, batch in zip(loads, phase.batch, strict=True):
                number += load.sum() - load[list(held[batch % len(held)])].sum()
    return int(number)


def upstreams_order(layers: tuple[str, ...], ranks: int, num_experts: int = 8) -> dict[str, LayerPlacement]:
    return {name: contiguous(num_experts, ranks) for name in layers}


def shuffled(layers: tuple[str, ...], ranks: int, num_experts: int = 8) -> dict[str, LayerPlacement]:
    generator = torch.Generator().manual_seed(ranks)
    orders = {name: torch.randperm(num_experts, generator=generator).tolist() for name in layers}
    return {name: tuple((number % ranks,) for number in order) for name, order in orders.items()}
