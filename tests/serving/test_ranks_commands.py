"""fairseq's own commands under several ranks: one complete result, equal to one rank's, and one report of all.

What one rank finds is computed in this process. Figures: upstream's own, tests' shared/goldens.
"""

import json
import math
import re
from dataclasses import dataclass

import commands
import numpy as np
import pytest
import torch

from fairseq_moe_ext.balancing.placement import Placement, contiguous, experts_of_rank, save_placement
from fairseq_moe_ext.trace import load_trace

STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction")
# as upstream's README.moe.md has them
UPSTREAM = {"world_size": 2, "replication_count": 1, "moe_eval_capacity_token_fraction": 0.05}
UPSTREAM |= {"use_moe_pad_mask": False, "pass_tokens_transformer_layer": False}
AS_UPSTREAM = ("--is-moe", "--distributed-world-size", "2", "--model-overrides", repr(UPSTREAM))
LM_LAYERS = ("decoder.layers.1.moe_layer", "decoder.layers.3.moe_layer")
MT_LAYERS = ("encoder.layers.1.moe_layer", "decoder.layers.1.moe_layer")
PLAIN, NLLB = commands.MT, (*commands.NLLB, "-t", "de")


@dataclass(frozen=True)
class Told:
    """What a run wrote with --moe-report and --moe-trace."""

    report: dict
    trace: dict

    @classmethod
    def read(cls, folder):
        return cls(json.loads((folder / "report.json").read_text()), load_trace(folder / "trace.npz"))

    def layers(self) -> dict[str, dict]:
        return {layer["name"]: layer for layer in self.report["layers"]}


def telling(folder) -> tuple:
    return ("--moe-report", folder / "report.json", "--moe-trace", folder / "trace.npz")


def arguments_of(goldens, name: str, *flags) -> tuple:
    return (goldens / name / "data-bin", "--path", goldens / name / "checkpoint_last.pt", *flags)


def eval_lm(goldens, *flags, ranks=2, rows: int = 8, **how):
    flags = (*commands.LM, "--batch-size", rows, *flags)
    return commands.run("eval-lm", *arguments_of(goldens, "lm_top2_ws2", *flags), ranks=ranks, **how)


def loss_of(done) -> tuple[str, str]:
    """(loss, perplexity) of the one line that says so; nothing else is printed, nothing is said twice."""
    ((loss, perplexity),) = re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", done.stderr)
    assert done.stdout == ""
    assert done.stderr.count("served: ") == done.stderr.count("loading model(s)") == 1
    return loss, perplexity


def assert_same_lines(output: str, wanted: commands.Generation, subset: str = "test") -> None:
    """Every line in one rank's order, ids and texts equal, scores to 1e-5."""
    found = commands.Generation(output.splitlines())
    assert [line.split("\t")[0] for line in found.lines] == [line.split("\t")[0] for line in wanted.lines]
    assert sum(line.startswith(f"Generate {subset} with beam") for line in found.lines) == 1
    assert found.of_kind("S") == wanted.of_kind("S") and found.of_kind("T") == wanted.of_kind("T")
    assert found.hypotheses() == wanted.hypotheses() and len(found.hypotheses()) == 100
    assert [fields[1] for _, fields in found.of_kind("D")] == [fields[1] for _, fields in wanted.of_kind("D")]
    np.testing.assert_allclose(found.scores(), wanted.scores(), rtol=0, atol=1e-5)
    for (_, ours), (_, theirs) in zip(found.of_kind("P"), wanted.of_kind("P"), strict=True):
        scores = [np.array(fields[0].split(), float) for fields in (ours, theirs)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1.1e-4)  # printed to 4 places


def assert_translated_once(done, sentences: int = 100) -> None:
    assert re.findall(r"Translated (\d+) sentences", done.stderr) == [str(sentences)]
    assert done.stderr.count("served: ") == done.stderr.count("loading model(s)") == 1


def assert_same_trace(found: Told, wanted: Told) -> None:
    assert found.trace.keys() == wanted.trace.keys()
    for phase, recorded in wanted.trace.items():
        assert found.trace[phase].names == recorded.names
        assert found.trace[phase].load.tolist() == recorded.load.tolist()
        assert found.trace[phase].batch.tolist() == recorded.batch.tolist()


def assert_report_of_all_ranks(found: Told, one: Told, placement: dict, ranks: int, model_dim: int) -> None:
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


def upstreams_order(layers, ranks: int, num_experts: int = 8) -> dict:
    return {name: contiguous(num_experts, ranks) for name in layers}


def shuffled(layers, ranks: int, num_experts: int = 8) -> dict:
    generator = torch.Generator().manual_seed(ranks)
    orders = {name: torch.randperm(num_experts, generator=generator).tolist() for name in layers}
    return {name: tuple((number % ranks,) for number in order) for name, order in orders.items()}


# --- language models


@pytest.fixture(scope="module")
def one_lm(shared_goldens, tmp_path_factory):
    """(loss, what was told) of one rank."""
    folder = tmp_path_factory.mktemp("one")
    flags = (*commands.LM, "--batch-size", 8, *telling(folder))
    return commands.eval_lm(*arguments_of(shared_goldens, "lm_top2_ws2", *flags)).loss, Told.read(folder)


def test_eval_lm_on_two_ranks(shared_goldens, tmp_path, one_lm):
    loss, _ = loss_of(done := eval_lm(shared_goldens, *telling(tmp_path)))
    assert float(loss) == pytest.approx(one_lm[0], abs=6e-5)
    assert loss == "7.4446" and "Perplexity: 174.20" in done.stderr
    told = Told.read(tmp_path)
    assert_same_trace(told, one_lm[1])
    assert_report_of_all_ranks(told, one_lm[1], upstreams_order(LM_LAYERS, 2), ranks=2, model_dim=64)


def test_eval_lm_on_three_ranks_with_shuffled_experts(shared_goldens, tmp_path, one_lm):
    """Three does not divide eight experts, nor the fifteen batches of eight rows evenly by what they hold."""
    placement = shuffled(LM_LAYERS, 3)
    save_placement(tmp_path / "placement.json", Placement(3, placement))
    flags = ("--expert-placement", tmp_path / "placement.json")
    assert loss_of(eval_lm(shared_goldens, *flags, *telling(tmp_path), ranks=3)) == ("7.4446", "174.20")
    told = Told.read(tmp_path)
    assert_same_trace(told, one_lm[1])
    assert_report_of_all_ranks(told, one_lm[1], placement, ranks=3, model_dim=64)


@pytest.mark.parametrize(
    ("fraction", "slots", "perplexity", "by_torchrun"),
    # upstream's documented flags start the ranks by themselves; slots: of each expert for two rows of 128 tokens
    [(1.0, 256, "174.20", True), (0.05, 13, "197.81", False)],
)
def test_static_gating_on_two_ranks_equals_upstreams(
    shared_goldens, tmp_path, fraction, slots, perplexity, by_torchrun
):
    total = tokens = 0
    for rank in (0, 1):
        file = shared_goldens / "lm_top2_ws2" / "golden" / f"eval_ws2_b2_cap{fraction}.rank{rank}.npz"
        with np.load(file) as arrays:
            for batch in range(int(arrays["n_batches"])):
                scores = arrays[f"b{batch}/scores"][arrays[f"b{batch}/target"] != 1]
                total, tokens = total + scores.sum(dtype=np.float64), tokens + len(scores)
    flags, ranks = ((*STATIC, fraction), 2) if by_torchrun else ((*STATIC[:2], *AS_UPSTREAM), None)
    done = eval_lm(shared_goldens, *flags, *telling(tmp_path), ranks=ranks, rows=2)
    loss, found = loss_of(done)
    assert tokens == 15035
    assert float(loss) == pytest.approx(-total / tokens / math.log(2), abs=1e-4)
    assert found == perplexity
    report = Told.read(tmp_path).report
    assert (report["world_size"], report["gating"]) == (2, "static")
    # 59 batches; of 8 experts 4 lie elsewhere, whatever was routed to them
    assert [layer["bytes_exchanged"] for layer in report["layers"]] == [59 * 4 * slots * 64 * 4] * 2


def test_static_gating_sends_more_at_the_same_checkpoint(one_lm):
    """All of its figures are written by hand above: dynamic's are the assignments that leave."""
    held = [experts_of_rank(contiguous(8, 2), rank) for rank in range(2)]
    for name in LM_LAYERS:
        assert 2 * assignments_that_leave(one_lm[1], name, held) < 59 * 4 * 256


@pytest.mark.slow
def test_shards_that_the_user_asked_for_on_two_ranks(shared_goldens):
    parts = ("--num-shards", "2", "--shard-id", "1")
    flags = (*commands.LM, "--batch-size", 8, *parts)
    wanted = commands.eval_lm(*arguments_of(shared_goldens, "lm_top2_ws2", *flags))
    loss, _ = loss_of(eval_lm(shared_goldens, *parts))
    assert float(loss) == pytest.approx(wanted.loss, abs=6e-5)
    assert abs(wanted.loss - 7.4446) > 1e-3  # a part's is another


@pytest.mark.slow
def test_bfloat16_on_two_ranks(shared_goldens, tmp_path):
    """lm_top2_ws2 scores 7.4446 in float32; bfloat16 may cost 0.01 bits."""
    loss, _ = loss_of(eval_lm(shared_goldens, "--moe-dtype", "bfloat16", *telling(tmp_path)))
    assert float(loss) == pytest.approx(7.4446, abs=0.01)
    assert Told.read(tmp_path).report["dtype"] == "bfloat16"
