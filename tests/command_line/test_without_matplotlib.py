"""Plots are an extra: what the subcommands do where matplotlib is not installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fairseq_moe_ext.command_line import main
from fairseq_moe_ext.command_line.parsing import NO_MATPLOTLIB
from fairseq_moe_ext.trace import PhaseTrace, save_trace


@pytest.fixture
def trace(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    load = np.random.default_rng(3).integers(0, 5, (6, 1, 4)).astype(np.uint32)
    save_trace(tmp_path / "trace.npz", {"decode": PhaseTrace(("layer",), load, np.arange(6))})
    return tmp_path / "trace.npz"


def test_simulate_writes_the_table_and_names_the_extra(trace, tmp_path, capsys):
    assert main(["simulate", str(trace), "--output", str(tmp_path / "out")]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["buffer.csv"]
    said = capsys.readouterr().err
    assert said == "buffer.png is left out: it needs matplotlib: pip install 'fairseq_moe_ext[reproduce]'\n"


def test_balance_refuses_the_plot_before_it_works(trace, tmp_path, capsys):
    arguments = ["balance", str(trace), "--world-size", "2", "--output", str(tmp_path / "placement.json")]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--plot", str(tmp_path / "plot.png")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and said.endswith(f"error: --plot {NO_MATPLOTLIB}")
    assert not (tmp_path / "placement.json").exists()
    assert main([*arguments, "--time-limit", "0.1"]) == 0
