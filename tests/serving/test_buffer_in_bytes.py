"""--expert-buffer-size in bytes and --expert-profile by languages: results, bytes and misses of served runs."""

import json
import logging
import re

import commands
import pytest
from buffer_makers import buffered

from fairseq_moe_ext.buffering.expert_profile import Languages, importance_of_layers
from fairseq_moe_ext.buffering.simulation import layers_of, simulate
from fairseq_moe_ext.command_line import main
from fairseq_moe_ext.trace import load_trace

DISK = ("--expert-store", "disk")
PAIR = Languages(("en",), ("de",))


class Run:
    """One run of mt_plain: its lines, report and trace; sizes: of every layer's buffer, as the log says."""

    def __init__(self, goldens, folder, caplog, *flags):
        folder.mkdir()
        path = goldens / "mt_plain" / "checkpoint_last.pt"
        files = ("--moe-report", folder / "report.json", "--moe-trace", folder / "trace.npz")
        how = ("--path", path, *commands.MT, "--batch-size", "36", "--max-len-b", "10")
        caplog.clear()
        with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
            self.lines = commands.generate(goldens / "mt_plain" / "data-bin", *how, *files, *flags).lines
        self.report = json.loads((folder / "report.json").read_text())
        self.layers = {layer["name"]: layer for layer in self.report["layers"]}
        self.recorded = layers_of(load_trace(folder / "trace.npz"))
        self.log = caplog.text
        self.sizes = {name: int(count) for count, name in re.findall(r"(\d+) experts of ([\w.]+)", caplog.text)}

    @property
    def misses(self) -> int:
        return self.report["ranks"][0]["misses"]


@pytest.fixture(scope="module")
def first(shared_goldens, tmp_path_factory):
    """All resident: (the run's folder, its lines, bytes of one expert)."""
    folder = tmp_path_factory.mktemp("first")
    files = ("--moe-trace", folder / "trace.npz", "--moe-record", folder / "record.npz")
    path = shared_goldens / "mt_plain" / "checkpoint_last.pt"
    how = ("--path", path, *commands.MT, "--batch-size", "36", "--max-len-b", "10")
    report = ("--moe-report", folder / "report.json")
    lines = commands.generate(shared_goldens / "mt_plain" / "data-bin", *how, *files, *report).lines
    assert main(["profile", str(folder / "record.npz"), "--output", str(folder / "profile.json")]) == 0
    total = json.loads((folder / "report.json").read_text())["memory"]["expert_bytes_total"]
    return folder, lines, total // 16  # two layers of 8


def assert_simulated(run: Run, importance) -> None:
    """Every layer's misses are those of the simulation at its own size, from the same residents and ranking."""
    assert run.sizes.keys() == run.layers.keys()
    for layer in run.recorded:
        ranking = importance[layer.name].ranking()
        wanted = simulate(layer, run.sizes[layer.name], "resident-first", "lfu", ranking)
        found = run.layers[layer.name]
        assert (found["hits"], found["misses"]) == (wanted.accesses - wanted.misses, wanted.misses)


@pytest.mark.parametrize("kind", ["trace.npz", "profile.json"])
def test_bytes_are_shared_out_by_a_profile(shared_goldens, tmp_path, caplog, first, kind):
    folder, lines, expert = first
    budget = 10 * expert + expert // 2
    profile = ("--expert-profile", folder / kind)
    run = Run(shared_goldens, tmp_path / kind, caplog, *buffered(f"{budget}B", *DISK, *profile))
    assert run.lines == lines
    kept = run.report["memory"]["expert_bytes_resident"]
    assert budget - expert < kept <= budget
    assert f"of {budget} bytes {kept} are shared out by --expert-profile: " in run.log
    assert_simulated(run, importance_of_layers(folder / kind, dict.fromkeys(run.layers, 8), list(run.layers), PAIR))


def test_without_a_profile_they_are_shared_evenly(shared_goldens, tmp_path, caplog, first):
    _, lines, expert = first
    run = Run(shared_goldens, tmp_path / "even", caplog, *buffered(f"{10 * expert}B", *DISK))
    assert run.lines == lines and "are shared out evenly: " in run.log
    assert run.report["memory"]["expert_bytes_resident"] == 10 * expert
    assert max(run.sizes.values()) - min(run.sizes.values()) <= 1
    for layer in run.recorded:
        wanted = simulate(layer, run.sizes[layer.name], "resident-first", "lfu")
        assert run.layers[layer.name]["misses"] == wanted.misses


def test_all_of_them_fit(shared_goldens, tmp_path, caplog, first):
    _, lines, expert = first
    run = Run(shared_goldens, tmp_path / "all", caplog, *buffered("1G", *DISK))
    assert run.lines == lines and run.misses == 0 and set(run.sizes.values()) == {8}
    assert run.report["memory"]["expert_bytes_resident"] == 16 * expert


def test_too_few_bytes_are_refused_with_the_least_that_works(shared_goldens, tmp_path, caplog, first):
    _, lines, expert = first
    with pytest.raises(ValueError, match=r"--expert-buffer-size must be at least \d+B .* got 10B") as found:
        Run(shared_goldens, tmp_path / "few", caplog, *buffered("10B", *DISK))
    least = re.search(r"at least (\d+B)", str(found.value)).group(1)
    run = Run(shared_goldens, tmp_path / "least", caplog, *buffered(least, *DISK))
    assert run.lines == lines and set(run.sizes.values()) == {1}
    assert run.report["memory"]["expert_bytes_resident"] == int(least[:-1])


def test_a_language_that_the_profile_lacks_is_refused(shared_goldens, tmp_path, caplog, first):
    content = json.loads((first[0] / "profile.json").read_text())
    content["languages"] = [{"en": "fr"}.get(each, each) for each in content["languages"]]
    (tmp_path / "profile.json").write_text(json.dumps(content))
    words = r"--expert-profile .*profile\.json: it knows the languages fr for encoder\.layers\.1\.moe_layer, not 'en'"
    with pytest.raises(ValueError, match=words):
        Run(shared_goldens, tmp_path / "run", caplog, *buffered(2, "--expert-profile", tmp_path / "profile.json"))
