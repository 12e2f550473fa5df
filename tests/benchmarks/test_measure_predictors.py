"""scripts/benchmarks/measure_predictors.py: what is heard is what was served, and guesses are what gates would say."""

import importlib
import re
import sys

import commands
import numpy as np
import processes
import pytest
import torch
from data_makers import MT_TRAINING, untrained_checkpoint, write_data

import fairseq_moe_ext as moe
from fairseq_moe_ext.buffering.model_calls import model_calls
from fairseq_moe_ext.trace import load_trace

SCRIPTS = commands.REPOSITORY / "scripts" / "benchmarks"
LINES = ["5 6 7", "8 9 10 11", "6 5", "12 13 14 15 16", "9 8", "7 7 7"]
FLAGS = "--moe-expert-count 12 --moe-freq 1 --encoder-normalize-before --decoder-normalize-before".split()


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield tuple(importlib.import_module(name) for name in ("heard_passes", "measure_predictors"))
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder of data and model.pt) whose attention adds nothing: the next layer's gate sees the residual."""
    folder = tmp_path_factory.mktemp("model")
    write_data(folder, ("en", "de"))
    untrained_checkpoint(folder / "model.pt", folder, *MT_TRAINING, *FLAGS)
    state = torch.load(folder / "model.pt", weights_only=False)
    for name, tensor in state["model"].items():
        if ".out_proj." in name:
            tensor.zero_()
    torch.save(state, folder / "model.pt")
    return folder


def test_what_is_heard_is_what_is_served(scripts, model, tmp_path):
    heard_passes, _ = scripts
    trace = str(tmp_path / "trace.npz")
    with moe.load(model / "model.pt", data=model, cpu=True, moe_trace=trace) as served:
        plain = served.translate(LINES, beam=3, batch_size=2)
    with moe.load(model / "model.pt", data=model, cpu=True) as served:
        with heard_passes.heard(served) as listener:
            assert served.translate(LINES, beam=3, batch_size=2) == plain
    expected = model_calls(load_trace(trace))
    calls = [call.as_model_call() for call in listener.calls]
    assert [(each.batch, each.phase, each.layer, each.load.tolist()) for each in calls] == [
        (each.batch, each.phase, each.layer, each.load.tolist()) for each in expected
    ]


def test_the_gate_on_the_residual_guesses_right_where_attention_adds_nothing(scripts, model):
    heard_passes, measure = scripts
    with moe.load(model / "model.pt", data=model, cpu=True) as served, heard_passes.heard(served) as listener:
        served.translate(LINES, beam=3, batch_size=2)
    table = measure.TokenTable(listener.calls)
    said = measure.said_of(listener.calls, table)
    assert measure.recall(listener.calls, said, heard_passes.RESIDUAL, 2) == 1.0
    assert 0 < measure.recall(listener.calls, said, heard_passes.INPUT, 2) < 1.0
    assert measure.in_vain(listener.calls, said, heard_passes.RESIDUAL, 1) == 0.0
    wide = [measure.recall(listener.calls, said, heard_passes.INPUT, at) for at in (2, 4, 8)]
    assert wide == sorted(wide)


def test_the_table_by_hand(scripts):
    heard_passes, measure = scripts
    call = heard_passes.HeardCall(
        0, "decode", 0, "d", 3, np.array([4, 4, 5, 1]), np.array([[0, 1], [0, 2], [1, 2], [-1, -1]]), (9,)
    )
    table = measure.TokenTable([call])
    rows = table.expected("d", np.array([4, 5, 6, 1]), 2)
    assert rows.tolist() == [[1, 0.5, 0.5], [0, 1, 1], [2 / 3] * 3, [2 / 3] * 3]  # of 6 and of padding nothing is known
    assert table.of_languages("d", (9, 9)).tolist() == [4, 4, 4]
    assert table.of_languages("d", (8,)).tolist() == [2, 2, 2]
    said = measure.said_of([call, call], table)
    assert measure.recall([call, call], said, measure.TABLE, 1) == pytest.approx(3 / 6)
    assert measure.recall([call, call], said, measure.LAST, 3) == 1.0  # of the second call alone


def test_the_scripts_tables(model, tmp_path):
    (tmp_path / "text").write_text("\n".join(LINES) + "\n")
    command = [sys.executable, SCRIPTS / "measure_predictors.py", "--model", model / "model.pt", "--data", model]
    command += ["--text", tmp_path / "text", "--batch-size", "2", "--search", '{"beam": 2, "max_len_b": 5}']
    done = processes.run(command, timeout=120, env=commands.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^\| next gate on the normed residual +\| 1\.00 +\| 1\.00 +\| 1\.00 ", done.stdout, re.M)
    assert re.search(r"^\| off +\| 1\.000 +\| 1\.000 +\| 1\.000 ", done.stdout, re.M)
    for name in ("oracle, next call", "table by token id", "layers"):
        assert len(re.findall(rf"^\| {name} +\|", done.stdout, re.M)) >= 1, name
