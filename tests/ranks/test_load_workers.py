"""`load(..., distributed_world_size=R)`: a program starts the other ranks itself, and they end with it."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
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


def _collect_beside_threads() -> None:
    """Threads of a fork take the places of its parent's: whoever waits for one of those waits for one of these."""
    for _ in range(16):
        threading.Thread(target=time.sleep, args=(10 * SECONDS,), daemon=True).start()
    gc.collect()


@pytest.mark.parametrize("killed", [False, True])
def test_a_forked_child_may_collect_what_a_closed_model_has_left(load, killed):
    gc.collect()
    gc.disable()
    try:
        served = load()
        lines = lines_of(served)[:2]
        if killed:
            workers_of(served)[0].kill()
            assert error_of(lambda: served.translate(lines))[0] == "ExchangeError"
        else:
            served.translate(lines)
        held = [served._parts.ranks]
        held.append(held)  # so that nothing but a collection frees them
        served.close()
        del held
        child = multiprocessing.get_context("fork").Process(target=_collect_beside_threads)
        child.start()
    finally:
        gc.enable()
    child.join(SECONDS)
    child.kill()
    assert child.exitcode == 0


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
import os, signal, sys
import fairseq_moe_ext as moe

path, data = sys.argv[1:]
served = moe.load(path, data=data, cpu=True, distributed_world_size=3)
print(*(worker.pid for worker in served._parts.ranks._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_callers_death_ends_its_workers(shared_goldens):
    folder = shared_goldens / "mt_plain"
    command = [sys.executable, "-c", PROGRAM, folder / "checkpoint_last.pt", folder / "data-bin"]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True, check=False)
    pids = done.stdout.split()
    assert len(pids) == 2, done.stderr[-2000:]
    deadline = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
