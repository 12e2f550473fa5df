"""`load(..., distributed_world_size=R)`: a program starts the other ranks itself, and they end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch.distributed as dist
from python_served import PIECES, lines_of
from rank_programs import assert_same, error_of, state_of_process

import fairseq_moe_ext as moe

SECONDS = 30  # in which a process has ended, on a machine that does much else


@pytest.fixture
def load(shared_goldens):
    folder = shared_goldens / "mt_plain"

    def load(ranks=2, **options):
        options = {**PIECES, "data": folder / "data-bin", "distributed_world_size": ranks, **options}
        return moe.load(folder / "checkpoint_last.pt", **options)

    return load


def workers_of(served) -> list[subprocess.Popen]:
    return list(served._parts.ranks._workers)


def test_a_program_starts_the_other_ranks_and_ends_them(load):
    with load(ranks=1) as served:
        lines = lines_of(served)[:6]
        wanted = served.generate(lines, beam=3, nbest=2, batch_size=2)
    before = state_of_process()
    with load() as served:
        (worker,) = workers_of(served)
        assert_same(served.generate(lines, beam=3, nbest=2, batch_size=2), wanted)
        errors = [lambda: served.translate(lines, beam=0), lambda: served.translate(lines, beam={1}), served.engine]
        assert [error_of(call)[1] for call in errors] == [
            "beam must be at least 1, got 0",
            "what several ranks are told must be texts, numbers, lists and mappings, got {1}",
            "engine() must be called where one process serves, got 2 ranks",
        ]
        assert len(served.score(lines, lines)) == 6
        report = served.report()
    assert report["world_size"] == 2 and all(rank["tokens"] > 0 for rank in report["ranks"])
    assert worker.returncode == 0
    assert state_of_process() == before and not dist.is_initialized()


@pytest.mark.parametrize("count", [0, -1, "2", 1.5])
def test_the_number_of_ranks_is_checked(load, count):
    assert error_of(lambda: load(ranks=count))[1] == f"distributed_world_size must be a number of ranks, got {count!r}"


@pytest.mark.slow
def test_report_and_trace_of_all_are_written_by_close(load, tmp_path):
    with load(moe_report=tmp_path / "report.json", moe_trace=tmp_path / "trace.npz") as served:
        served.translate(lines_of(served)[:4], batch_size=1)
    assert (tmp_path / "report.json").exists() and (tmp_path / "trace.npz").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_leaves_no_worker(load):
    kind, said = error_of(lambda: load(expert_bufer_size=2))
    assert kind == "OptionError" and "did you mean expert_buffer_size" in said
    assert not children()


@pytest.mark.slow
def test_more_ranks_than_experts_are_refused(load):
    assert "9 ranks, 8 experts" in error_of(lambda: load(ranks=9))[1]


@pytest.mark.slow
def test_a_worker_that_dies_is_an_exception_and_the_model_can_only_be_closed(load):
    served = load(ranks=3)
    lines = lines_of(served)[:4]
    first, second = workers_of(served)
    first.kill()
    said = [error_of(lambda: served.translate(lines, batch_size=1)) for _ in range(2)]
    served.close()
    assert said == [
        ("ExchangeError", "translate() broke off: rank 1 of 3 vanished"),
        ("ExchangeError", "the model can only be closed: rank 1 of 3 vanished"),
    ]
    assert first.returncode == -signal.SIGKILL and second.returncode == 0


@pytest.mark.slow
def test_a_model_that_is_deleted_ends_its_workers(load):
    served = load()
    (worker,) = workers_of(served)
    del served
    assert worker.returncode == 0


PROGRAM = """
import os, signal, sys, time
import fairseq_moe_ext as moe

path, data, forks = sys.argv[1:]
served = moe.load(path, data=data, cpu=True, distributed_world_size=3)
print(*(worker.pid for worker in served._parts.ranks._workers), flush=True)
parent = os.getpid()
if forks == "True" and (child := os.fork()):
    print(child, flush=True)
if os.getpid() != parent:
    os.close(1)
    time.sleep(600)
os.kill(parent, signal.SIGKILL)
"""


def runs(pid: str) -> bool:
    """Whether it has not ended; of one that nobody waits for nothing but its name is left."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("forks", [False, True])
def test_the_callers_death_ends_its_workers(shared_goldens, forks):
    """Also while a forked child of it lives, which has the ends of all its pipes."""
    folder = shared_goldens / "mt_plain"
    command = [sys.executable, "-c", PROGRAM, folder / "checkpoint_last.pt", folder / "data-bin", str(forks)]
    done = subprocess.run(command, env=commands.environment(), stdout=subprocess.PIPE, text=True, check=False)
    first, second, *children = done.stdout.split()
    try:
        deadline = time.monotonic() + SECONDS
        while runs(first) or runs(second):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(children) == forks and all(map(runs, children))
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def children() -> list[str]:
    """Workers that this process has left behind."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("PPid:"))
            command = (status.parent / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if parent == str(os.getpid()) and "serving.worker" in command:
            found.append(status.parent.name)
    return found
