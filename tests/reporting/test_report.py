"""The report and the trace of one served run tell the same story, and the data's."""

import json

import commands
import numpy as np
import pytest

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.trace import load_trace

STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.1")
LM_TOKENS = 15035


class Served:
    """A served run: its report, its trace, and what the command gave."""

    def __init__(self, goldens, folder, name: str, *flags, command="generate"):
        self.data, self.path = goldens / name / "data-bin", goldens / name / "checkpoint_last.pt"
        files = ("--moe-report", folder / "report.json", "--moe-trace", folder / "trace.npz")
        common = commands.LM if command == "eval_lm" else commands.MT
        self.result = getattr(commands, command)(self.data, "--path", self.path, *files, *common, *flags)
        self.report = json.loads((folder / "report.json").read_text())
        self.trace = load_trace(folder / "trace.npz")
        self.layers = {layer["name"]: layer for layer in self.report["layers"]}
        assert sorted(file.name for file in folder.iterdir()) == ["report.json", "trace.npz"]


@pytest.fixture(scope="module")
def lm(shared_goldens, tmp_path_factory):
    return Served(shared_goldens, tmp_path_factory.mktemp("lm"), "lm_top2", "--batch-size", "8", command="eval_lm")


@pytest.fixture(scope="module")
def static_lm(shared_goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("static_lm")
    return Served(shared_goldens, folder, "lm_top2", "--batch-size", "8", *STATIC, command="eval_lm")


@pytest.fixture(scope="module")
def mt(shared_goldens, tmp_path_factory):
    return Served(shared_goldens, tmp_path_factory.mktemp("mt"), "mt_plain", "--batch-size", "36")


@pytest.fixture(scope="module")
def scored_mt(shared_goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored_mt")
    return Served(shared_goldens, folder, "mt_plain", "--batch-size", "36", "--score-reference")


@pytest.fixture(params=["lm", "static_lm", "mt", "scored_mt"])
def served(request):
    return request.getfixturevalue(request.param)


def test_layers_bear_the_checkpoints_names(served):
    gate = ".gate.wg.weight"
    names = [key.removesuffix(gate) for key in read_checkpoint(str(served.path))["model"] if key.endswith(gate)]
    assert sorted(served.layers) == sorted(names)
    assert sorted(name for phase in served.trace.values() for name in set(phase.names)) == sorted(names)


def test_loads_are_the_assignments_that_were_not_dropped(served):
    for layer in served.layers.values():
        assert len(layer["load"]) == 8
        assert sum(layer["load"]) == layer["assignments"] - layer["dropped"]
        assert 1 <= layer["active_experts_mean"] <= 8


def test_the_traces_steps_sum_to_the_reports_loads(served):
    for phase in served.trace.values():
        total = phase.load.sum(axis=0, dtype=np.int64)  # (L, E)
        for name, load in zip(phase.names, total, strict=True):
            assert served.layers[name]["load"] == load.tolist()
            active = np.mean((phase.load[:, phase.names.index(name)] > 0).sum(axis=1))
            assert served.layers[name]["active_experts_mean"] == pytest.approx(active)


def test_batch_numbers_rise_from_0(served):
    for phase in served.trace.values():
        assert phase.load.shape == (len(phase.batch), len(phase.names), 8)
        assert phase.load.dtype.kind == "u"
        assert sorted(set(phase.batch.tolist())) == list(range(max(phase.batch) + 1))
        assert (np.diff(phase.batch) >= 0).all()


def test_seconds_are_positive_and_rates_follow(served):
    for side in ("encoder", "decoder"):
        totals = served.report.get(side)
        if totals:
            assert totals["seconds"] > 0
            assert totals["tokens_per_second"] == pytest.approx(totals["tokens"] / totals["seconds"])
    for layer in served.layers.values():
        assert {"gate", "dispatch", "experts", "combine"} <= set(layer["seconds"])
        assert all(seconds > 0 for seconds in layer["seconds"].values())
    parts = sum(sum(layer["seconds"].values()) for layer in served.layers.values())
    assert parts < sum(served.report[side]["seconds"] for side in ("encoder", "decoder") if side in served.report)


def test_memory_and_model(served):
    memory = served.report["memory"]
    model = read_checkpoint(str(served.path))["model"]
    experts = sum(tensor.numel() * 4 for key, tensor in model.items() if ".experts." in key)
    assert memory["expert_bytes_total"] == memory["expert_bytes_resident"] == experts
    assert memory["peak_rss_bytes"] > 50e6
    assert memory["peak_device_bytes"] == 0
    assert served.report["device"] == "cpu"
    assert served.report["dtype"] == "float32"
    assert served.report["world_size"] == 1
    assert [rank["rank"] for rank in served.report["ranks"]] == [0]


def test_a_language_models_tokens_are_the_datas(lm):
    assert lm.report["gating"] == "dynamic"
    assert "encoder" not in lm.report
    assert lm.report["decoder"]["tokens"] == LM_TOKENS
    assert lm.report["decoder"]["steps"] == len(lm.result.batches) == 15
    assert set(lm.trace) == {"prefill"}
    assert lm.trace["prefill"].batch.tolist() == list(range(15))
    for layer in lm.layers.values():
        assert layer["assignments"] == 2 * LM_TOKENS
        assert layer["dropped"] == 0
    tokens = [sum(map(len, batch.scores)) for batch in lm.result.batches]
    assert [int(step.sum()) for step in lm.trace["prefill"].load[:, 0]] == [2 * number for number in tokens]


def test_static_gating_counts_what_it_drops_and_routes_padding(static_lm):
    assert static_lm.report["gating"] == "static"
    assert static_lm.report["decoder"]["tokens"] == LM_TOKENS
    for layer in static_lm.layers.values():
        assert layer["assignments"] == 2 * 118 * 128  # the last block is padded, and this checkpoint routes padding
        assert 0 < layer["dropped"] < layer["assignments"]
        assert "capacity" in layer["seconds"]
    assert static_lm.trace["prefill"].load[:14].max() <= np.ceil(0.1 * 8 * 128)


def test_generation_counts_sentences_and_live_beams(mt):
    sources = sum(len(fields[0].split()) for _, fields in raw_lines(mt, "S")) + 100  # each with its end
    assert mt.report["encoder"]["tokens"] == sources
    hypotheses = [len(fields[0].split()) for _, fields in mt.result.of_kind("P")]  # tokens and the end
    assert mt.report["generation"] == {"sentences": 100, "hypothesis_tokens": sum(hypotheses)}
    decode = mt.trace["decode"]
    assert set(mt.trace) == {"encoder", "decode"}
    assert len(decode.batch) == mt.report["decoder"]["steps"]
    per_step = decode.load[:, 0].sum(axis=1)
    # two experts per token of a live beam; 4 beams per sentence, and a sentence leaves when it is done
    assert per_step.sum() == 2 * mt.report["decoder"]["tokens"]
    for batch, sentences in enumerate((32, 32, 32, 4)):  # fairseq makes batches of whole eights
        steps = (per_step[decode.batch == batch] / 2).tolist()
        assert steps[0] == 4 * sentences
        assert all(after <= before for before, after in zip(steps, steps[1:], strict=False))
        assert all(step % 4 == 0 for step in steps)
        assert steps[-1] < steps[0]
    assert mt.report["decoder"]["tokens"] >= sum(hypotheses)
    assert mt.trace["encoder"].load[:, 0].sum() == 2 * sources


def raw_lines(served, kind: str):
    """Lines of one kind with the pieces of words apart, as the model sees them."""
    arguments = [flag for flag in commands.MT if flag not in ("--remove-bpe", "sentencepiece")]
    found = commands.generate(served.data, "--path", served.path, *arguments, "--batch-size", "36", "--score-reference")
    return found.of_kind(kind)


def test_scored_references_are_prefill(scored_mt):
    assert set(scored_mt.trace) == {"encoder", "prefill"}
    assert scored_mt.report["decoder"]["tokens"] == 1797  # the README's number of target tokens
    assert scored_mt.trace["prefill"].load[:, 0].sum() == 2 * 1797
    assert scored_mt.trace["prefill"].batch.tolist() == scored_mt.trace["encoder"].batch.tolist()
