"""fairseq-moe simulate with clocks: what it writes is what the replay gives; options that do nothing are refused."""

import csv
import json

import numpy as np
import pytest

from fairseq_moe_ext.buffering.eviction import Buffer
from fairseq_moe_ext.buffering.model_calls import model_calls
from fairseq_moe_ext.buffering.prefetchers import HotSet, Oracle
from fairseq_moe_ext.buffering.profile import LayerProfile, Profile, save_profile
from fairseq_moe_ext.buffering.rates import Costs, Rates
from fairseq_moe_ext.buffering.replay import replay
from fairseq_moe_ext.buffering.simulation import hottest_experts, layers_of, simulate
from fairseq_moe_ext.command_line.replay_table import COLUMNS, PREFETCHERS
from fairseq_moe_ext.command_line.simulate import main
from fairseq_moe_ext.trace import TraceRecorder, halve_trace, save_trace


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """(folder with first.npz and second.npz, the two traces)"""
    generator, recorder = np.random.default_rng(0), TraceRecorder()
    for batch in range(6):
        for phase, layers in (("encoder", ["e"]), *[("decode", ["d", "f"])] * 3):
            recorder.begin_step(phase, batch)
            for layer in layers:
                recorder.add(layer, generator.poisson(0.5, 8).tolist())
    folder, traces = tmp_path_factory.mktemp("traces"), halve_trace(recorder.trace())
    for name, trace in zip(("first", "second"), traces, strict=True):
        save_trace(folder / f"{name}.npz", trace)
    nothing = np.zeros((2, 8), np.int64)
    importance = np.array([[0.0] * 8, np.arange(8) / 8])
    layer = LayerProfile(np.array([0, 5]), importance, nothing, nothing, np.zeros(8, np.int64))
    save_profile(folder / "profile.json", Profile(("en", "de"), {"d": layer}))
    return folder, traces


def test_a_profiles_first_experts_are_resident(halves, tmp_path):
    """Those of one layer; of the others it says nothing."""
    folder, (_, second) = halves
    given = ["--output", str(tmp_path), "--profile", str(folder / "profile.json"), "--profile-languages", "de"]
    assert main([str(folder / "second.npz"), *given]) == 0
    with open(tmp_path / "buffer.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if [*row.values()][1:4] == ["3", "resident-first", "lru"]]
    for layer in layers_of(second):
        ranking = list(range(8))[::-1] if layer.name == "d" else None
        (row,) = (row for row in rows if row["layer"] == layer.name)
        assert int(row["misses"]) == simulate(layer, 3, "resident-first", "lru", ranking).misses


def test_what_is_written_is_the_replays(halves, tmp_path, capsys):
    folder, (first, second) = halves
    told = "--expert-bytes 2K --disk-rate 1M --read-latency 0.001 --readers 2 --staging 3 --ahead 2"
    told += " --expert-seconds 0.002"
    told += " --row-seconds 0.0005 --dense-seconds 0.003 --miss-seconds 0.001"
    told += " --expert-buffer-size 2 3 --expert-eviction lru min"
    given = [str(folder / "second.npz"), "--output", str(tmp_path), "--profile", str(folder / "first.npz")]
    assert main([*given, *told.split()]) == 0
    with open(tmp_path / "replay.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(PREFETCHERS) * 3  # sizes, policies; two phases and all
    assert tuple(rows[0]) == COLUMNS
    said = json.loads((tmp_path / "replay.json").read_text())
    assert [{name: str(value) for name, value in row.items()} for row in said["rows"]] == rows
    assert said["rates"]["disk_rate"] == 2**20 and said["rates"]["staging"] == 3 and said["rates"]["alone"] is True

    profile, calls = {layer.name: layer for layer in layers_of(first)}, model_calls(second)
    rates = Rates(2048, 2**20, 0.001, 2, 0.002, 0.0005, 0.003, 0.001)
    totals = {name: layer.loads.sum(axis=0) for name, layer in profile.items()}
    for name, prefetcher in (("hot-set", HotSet(calls, totals)), ("oracle", Oracle(calls))):
        buffers = {
            name: Buffer(3, "lru", "resident-first", hottest_experts(layer)[:3]) for name, layer in profile.items()
        }
        costs = sum(replay(calls, buffers, rates, prefetcher, 3, 2, alone=True).values(), Costs())
        (row,) = (row for row in rows if [*row.values()][:4] == ["3", "lru", name, "all"])
        assert (int(row["misses"]), int(row["bytes_in_vain"])) == (costs.misses, costs.in_vain * 2048)
        assert float(row["seconds"]) == pytest.approx(costs.seconds, abs=1e-6)
        assert float(row["disk_seconds"]) <= float(row["seconds"]) >= float(row["resident_seconds"])
    assert "oracle" in capsys.readouterr().out
    assert (tmp_path / "buffer.csv").exists()


def report(misses: int = 0) -> dict:
    layers = [{"name": name, "misses": misses, "seconds": {"experts": 2.0, "gate": 1.0}} for name in ("e", "d", "f")]
    return {"layers": layers, "encoder": {"seconds": 5.0}, "decoder": {"seconds": 34.0}}


def test_what_computation_costs_is_the_reports(halves, tmp_path):
    """So a run whose experts are all resident takes the report's seconds."""
    folder, (_, second) = halves
    (tmp_path / "report.json").write_text(json.dumps(report()))
    told = "--expert-bytes 2K --expert-buffer-size 8 --expert-eviction lfu --expert-prefetch off".split()
    given = ["--output", str(tmp_path), "--report", str(tmp_path / "report.json")]
    assert main([str(folder / "second.npz"), *given, *told]) == 0
    said = json.loads((tmp_path / "replay.json").read_text())
    found = {row["phase"]: row["seconds"] for row in said["rows"]}
    assert found == pytest.approx({"encoder": 5.0, "decode": 34.0, "all": 39.0})
    turns = sum(int((layer.loads > 0).sum()) for layer in layers_of(second) if layer.name != "e")
    assert said["rates_of_phases"]["decode"]["expert_seconds"] == pytest.approx(4.0 / turns)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--expert-bytes 1M --report REPORT --dense-seconds 1", "--report must go without --expert-seconds"),
        ("--expert-bytes 1M --report TRACE", "--report must be what --moe-report wrote"),
        ("--expert-bytes 1M --report MISSES", "--report must be of a run with all experts resident"),
        ("--report REPORT", "--report must go with --expert-bytes"),
        ("--profile-languages en", "--profile-languages must go with --profile"),
        ("--profile TRACE --profile-languages en", "--profile-languages must go with a --profile of fairseq-moe"),
        ("--profile PROFILE --profile-languages fr", "--profile-languages must name one that d had tokens of, de, got"),
        ("--disk-rate 1G", "--disk-rate must go with --expert-bytes"),
        ("--expert-bytes 1M --world-size 2", "--expert-bytes must go without --world-size"),
        ("--expert-bytes 1M --expert-prefetch hot-set", "--expert-prefetch hot-set must go with --profile"),
        ("--expert-bytes 0", "expert_bytes must be above 0, got 0"),
        ("--expert-bytes 1M --row-seconds -1", "must be seconds of 0 or more, got '-1'"),
    ],
)
def test_options_that_do_nothing_are_refused(halves, tmp_path, capsys, options, sentence):
    folder, _ = halves
    with pytest.raises(SystemExit) as ended:
        for word, misses in (("REPORT", 0), ("MISSES", 3)):
            (tmp_path / word).write_text(json.dumps(report(misses)))
        files = {word: str(tmp_path / word) for word in ("REPORT", "MISSES")}
        files |= {"TRACE": str(folder / "first.npz"), "PROFILE": str(folder / "profile.json")}
        given = [files.get(word, word) for word in options.split()]
        main([str(folder / "second.npz"), "--output", str(tmp_path / "out"), *given])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "buffer.csv").exists()
