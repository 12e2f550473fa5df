"""Fitting a whole trace: halves, phases, figures; and the script as a user starts it."""

import json
import re
import sys

import commands
import numpy as np
import processes
import pytest

from fairseq_moe_ext.balancing.fit import fit_layers, phases_of_layers
from fairseq_moe_ext.balancing.load import layer_load
from fairseq_moe_ext.balancing.placement import contiguous, load_placement
from fairseq_moe_ext.balancing.solve import METHODS, Demand, evenness
from fairseq_moe_ext.trace import TraceRecorder, halve_trace, save_trace

SCRIPT = commands.REPOSITORY / "scripts" / "balance_experts.py"
ENCODER, DECODER = "encoder.layers.1.moe_layer", "decoder.layers.1.moe_layer"
DEMAND = Demand(world_size=2, time_limit=0.5)


def record(phases=("encoder", "prefill", "decode"), batches=8, experts=6, seed=0):
    """Experts are hot in turns, and every phase has its own load."""
    random, recorder = np.random.default_rng(seed), TraceRecorder()
    popular = random.dirichlet(np.full(experts, 0.5), size=3)
    for batch in range(batches):
        for number, phase in enumerate(("encoder", "prefill", "decode")):
            for _ in range(3 if phase == "decode" else 1):
                load = random.multinomial(40, popular[number])
                if phase in phases:
                    recorder.begin_step(phase, batch)
                    recorder.add(ENCODER if phase == "encoder" else DECODER, load)
    return recorder.trace()


@pytest.mark.parametrize("phases, decoder_phase, expected", [
    (("encoder", "prefill", "decode"), None, "decode"),
    (("encoder", "prefill", "decode"), "prefill", "prefill"),
    (("encoder", "prefill"), None, "prefill"),
])
def test_the_phase_that_a_layer_is_fitted_on(phases, decoder_phase, expected):
    assert phases_of_layers(record(phases), decoder_phase) == {ENCODER: "encoder", DECODER: expected}


def test_a_phase_that_was_not_recorded():
    with pytest.raises(ValueError, match="phase must be one that the trace holds of decoder.*got decode"):
        phases_of_layers(record(("prefill",)), "decode")


@pytest.mark.parametrize("objective", ["tokens", "active"])
@pytest.mark.parametrize("per_step", [False, True])
def test_first_half_fits_second_half_tests(objective, per_step):
    trace = record()
    halves = halve_trace(trace)
    layers = list(fit_layers(trace, DEMAND, objective, per_step))
    assert [(layer.name, layer.phase) for layer in layers] == [(ENCODER, "encoder"), (DECODER, "decode")]
    for layer in layers:
        loads = [layer_load(half[layer.phase], layer.name, objective, per_step) for half in halves]
        assert list(layer.methods) == list(METHODS)
        for fit in layer.methods.values():
            assert [fit.fitted, fit.held_out] == [evenness(half, fit.layer, 2) for half in loads]
            assert fit.fitted.avg_max_load >= layer.bound - 1e-9
    changed = {**trace, "decode": type(trace["decode"])((DECODER,), trace["decode"].load.copy(), trace["decode"].batch)}
    changed["decode"].load[changed["decode"].batch >= 4] = 7  # the test half: nothing fitted may change
    refitted = list(fit_layers(changed, DEMAND, objective, per_step))
    assert [fit.layer for fit in refitted[1].methods.values()] == [fit.layer for fit in layers[1].methods.values()]


def test_replicas_and_active_experts():
    with pytest.raises(ValueError, match="^replicas must be 0 for the objective active, got 1"):
        next(fit_layers(record(), Demand(2, replicas=1), "active"))


def balance_experts(*arguments):
    """The script in a process of its own."""
    return processes.run([sys.executable, SCRIPT, *arguments], timeout=300)


@pytest.fixture(scope="module")
def served_trace(shared_goldens, tmp_path_factory):
    """What fairseq-generate recorded of a model that upstream trained."""
    path, golden = tmp_path_factory.mktemp("traces") / "trace.npz", shared_goldens / "mt_plain"
    model = ("--path", golden / "checkpoint_last.pt", *commands.MT)
    commands.run("generate", golden / "data-bin", *model, "--batch-size", 10, "--moe-trace", path)
    return path


FIGURES = re.compile(r"^(\S+) +(0\.\d{4}) +(0\.\d{4}) +(0\.\d{4}) +(0\.\d{4}) +(\S+%)$", re.MULTILINE)


def test_the_script_on_a_served_trace(served_trace, tmp_path):
    done = balance_experts(
        served_trace, "--world-size", 4, "--method", "exact", "--output", tmp_path / "placement.json",
        "--plot", tmp_path / "plot.png", "--time-limit", 5,
    )
    assert done.returncode == 0, done.stderr
    placement = load_placement(tmp_path / "placement.json")
    assert placement.method == "exact"
    placement.check_fits(4, {ENCODER: 8, DECODER: 8})
    rows = FIGURES.findall(done.stdout)
    assert [row[0] for row in rows] == [*METHODS] * 2
    for number, (name, layer) in enumerate(placement.layers.items()):
        contiguous_row, exact_row = rows[5 * number], rows[5 * number + 4]
        assert float(exact_row[2]) <= float(contiguous_row[2])
        assert exact_row[5] == "0.0%"  # 8 experts: the bound is reached
        assert sorted(map(layer.count, {*layer})) == [2, 2, 2, 2], name
    assert "proved bound" in done.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["placement.json", "plot.png"]


def test_the_script_with_more_ranks_than_experts_and_a_budget(tmp_path):
    save_trace(tmp_path / "trace.npz", record())
    flags = ("--world-size", 8, "--replicas", 4, "--experts-per-rank", 3, "--method", "greedy", "--time-limit", 0.5)
    done = balance_experts(tmp_path / "trace.npz", *flags, "--output", tmp_path / "placement.json", "--steps")
    assert done.returncode == 0, done.stderr
    placement = json.loads((tmp_path / "placement.json").read_text())
    assert placement["world_size"] == 8 and placement["method"] == "greedy"
    for ranks in placement["layers"].values():
        assert sum(map(len, ranks)) == 10 and {rank for copies in ranks for rank in copies} == set(range(8))
    assert "contiguous" not in done.stdout


def test_the_script_writes_upstreams_placement(tmp_path):
    save_trace(tmp_path / "trace.npz", record(("prefill",)))
    flags = ("--world-size", 4, "--method", "contiguous", "--time-limit", 0.5, "--phase", "prefill")
    done = balance_experts(tmp_path / "trace.npz", *flags, "--output", tmp_path / "placement.json")
    assert done.returncode == 0, done.stderr
    assert load_placement(tmp_path / "placement.json").layers == {DECODER: contiguous(6, 4)}


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    save_trace(path, record())
    path.write_bytes(path.read_bytes()[:-300])


def missing(path):
    pass


def one_batch(path):
    save_trace(path, record(batches=1))


def whole(path):
    save_trace(path, record())


@pytest.mark.parametrize("write, flags, message", [
    (empty, (), "bad.npz: not a routing trace"),
    (truncated, (), "bad.npz: not a routing trace"),
    (missing, (), "bad.npz: not a routing trace"),
    (one_batch, (), "a trace to split must have at least 2 batches, got 1 in its encoder phase"),
    (whole, ("--world-size", 7), "world size must be at most the number of experts and replicas (6)"),
    (whole, ("--world-size", 0), "world size must be at least 1, got 0"),
    (whole, ("--replicas", 7), "replicas must be 0 to 6"),
    (whole, ("--replicas", 3, "--experts-per-rank", 4), "experts per rank must be at least 5"),
    (whole, ("--replicas", 1, "--objective", "active"), "replicas must be 0 for the objective active"),
    (whole, ("--replicas", 1, "--method", "contiguous"), "--replicas must be 0 for --method contiguous, got 1"),
    (whole, ("--output", "no/such/folder.json"), "--output no/such/folder.json cannot be written: there is no folder"),
    (lambda path: save_trace(path, record(("encoder", "prefill"))), ("--phase", "decode"), "got decode"),
], ids=lambda value: None if callable(value) else str(value))
def test_faults_are_one_line(write, flags, message, tmp_path):
    write(tmp_path / "bad.npz")
    output = tmp_path / "placement.json"
    done = balance_experts(tmp_path / "bad.npz", "--world-size", 2, "--output", output, *flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert "error: " in done.stderr.splitlines()[-1] and message in done.stderr.splitlines()[-1]
    assert not output.exists()
