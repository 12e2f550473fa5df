"""A report or trace that cannot be written in the end: the results and the other file are there, exit code 1."""

import json
import os
import subprocess

import commands
import pytest
from rank_commands import arguments_of, loss_of

from fairseq_moe_ext.trace import load_trace

FULL = "/dev/full"  # takes every write for one to a full disk
REASON = "cannot be written: No space left on device"
RANKS = [None, pytest.param(2, id="two ranks")]


def check_told(done, flag: str, ranks: int | None) -> None:
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {flag} {FULL} {REASON}"]
    assert done.stderr.count("served: ") == 1
    assert done.stderr.count("Traceback") == (0 if ranks is None else 1)  # torchrun's own


@pytest.mark.parametrize("ranks", RANKS)
def test_a_report_that_eval_lm_cannot_write(shared_goldens, tmp_path, ranks):
    flags = ("--batch-size", 8, "--moe-report", FULL, "--moe-trace", tmp_path / "trace.npz")
    done = commands.run("eval-lm", *arguments_of(shared_goldens, "lm_top2_ws2", *flags), check=False, ranks=ranks)
    check_told(done, "--moe-report", ranks)
    assert loss_of(done) == ("7.4446", "174.20")
    assert load_trace(tmp_path / "trace.npz")["prefill"].load.sum() == 2 * 2 * 15035


@pytest.mark.parametrize("ranks", [None, pytest.param(2, id="two ranks", marks=pytest.mark.slow)])
def test_a_trace_that_generate_cannot_write(shared_goldens, tmp_path, ranks):
    flags = ("--batch-size", 36, "--beam", 1, "--moe-trace", FULL, "--moe-report", tmp_path / "report.json")
    done = commands.run("generate", *arguments_of(shared_goldens, "mt_plain", *flags), check=False, ranks=ranks)
    check_told(done, "--moe-trace", ranks)
    assert done.stdout.splitlines()[-1].startswith("Generate test with beam=1: BLEU")
    assert json.loads((tmp_path / "report.json").read_text())["generation"]["sentences"] == 100


def test_a_report_that_interactive_cannot_write(shared_goldens, tmp_path):
    """It writes when its process ends; its trace comes last."""
    flags = ("--beam", 1, "--moe-trace", tmp_path / "trace.npz", "--moe-report", FULL)
    arguments = arguments_of(shared_goldens, "mt_plain", *flags)
    done = commands.run("interactive", *arguments, check=False, stdin="a b\nc\n")
    check_told(done, "--moe-report", None)
    assert done.stdout.count("\nH-") == 2 and load_trace(tmp_path / "trace.npz")


def test_a_fifo_gets_the_report_and_a_link_stays(shared_goldens, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "trace.npz").symlink_to("store.npz")
    flags = ("--batch-size", 8, "--moe-report", tmp_path / "fifo", "--moe-trace", tmp_path / "trace.npz")
    with open(tmp_path / "read", "wb") as out, subprocess.Popen(["cat", tmp_path / "fifo"], stdout=out) as cat:
        commands.run("eval-lm", *arguments_of(shared_goldens, "lm_top2_ws2", *flags))
        assert cat.wait(timeout=60) == 0
    assert json.loads((tmp_path / "read").read_text())["world_size"] == 1
    assert (tmp_path / "trace.npz").is_symlink() and load_trace(tmp_path / "store.npz")
