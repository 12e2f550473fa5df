"""A program that serves by several ranks forks: its child neither ends nor disturbs what the program goes on with.

A loader's worker, `multiprocessing` and `os.fork` copy the model; the connections and the workers are the parent's.
"""

import gc
import multiprocessing
import sys
import threading
import time
import weakref
from pathlib import Path

import commands
import processes
import pytest
from python_served import PIECES, lines_of
from rank_group import ranks
from rank_programs import error_of

import fairseq_moe_ext as moe

SECONDS = 30  # in which a child has ended, on a machine that does much else
STILL_THERE = 3  # the exit code of a child in which the model was not freed


def load(folder: Path, **options):
    return moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **{**PIECES, **options})


def exit_code(function, *arguments) -> int | None:
    """Of a forked child that runs `function`; None where it did not end."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(SECONDS)
    code = child.exitcode
    child.kill()
    child.join()
    return code


def collect_beside_threads() -> None:
    """Threads of a fork take the places of its parent's: whoever waits for one of those waits for one of these."""
    for _ in range(16):
        threading.Thread(target=time.sleep, args=(10 * SECONDS,), daemon=True).start()
    gc.collect()


def drop(held: list) -> None:
    """held: the model, of which there is no other reference."""
    model = weakref.ref(held[0])
    held.clear()
    collect_beside_threads()
    if model() is not None:
        sys.exit(STILL_THERE)


@pytest.mark.parametrize("killed", [False, True])
def test_a_forked_child_may_collect_what_a_closed_model_has_left(shared_goldens, killed):
    gc.collect()
    gc.disable()
    try:
        served = load(shared_goldens / "mt_plain", distributed_world_size=2)
        lines = lines_of(served)[:2]
        if killed:
            served._parts.ranks._workers[0].kill()
            assert error_of(lambda: served.translate(lines))[0] == "ExchangeError"
        else:
            served.translate(lines)
        held = [served._parts.ranks]
        held.append(held)  # so that nothing but a collection frees them
        served.close()
        del held
        code = exit_code(collect_beside_threads)
    finally:
        gc.enable()
    assert code == 0


def test_a_forked_child_may_drop_a_model_that_its_parent_goes_on_with(shared_goldens):
    held = [load(shared_goldens / "mt_plain", distributed_world_size=2)]
    try:
        lines = lines_of(held[0])[:4]
        wanted = held[0].translate(lines, batch_size=1)
        assert exit_code(drop, held) == 0
        assert held[0].translate(lines, batch_size=1) == wanted
    finally:
        held[0].close()


def fork_and_go_on(rank, world_size, folder):
    held = [load(folder)]
    lines = lines_of(held[0])[:4]
    before = held[0].translate(lines, batch_size=1)
    code = exit_code(drop, held)
    after = held[0].translate(lines, batch_size=1)
    held[0].close()
    return code, before == after


def test_a_forked_child_may_drop_a_model_of_its_parents_own_ranks(shared_goldens):
    with ranks(2) as group:
        assert group(fork_and_go_on, shared_goldens / "mt_plain") == [(0, True)] * 2


# what a child does with a model before its interpreter ends, as any program's; `seconds` until it is given up
PROGRAM = """
import gc, os, signal, sys, threading, time
import fairseq_moe_ext as moe

path, data, ranks, report, seconds = sys.argv[1:]
served = moe.load(path, data=data, cpu=True, distributed_world_size=int(ranks), moe_report=report)
lines = ["▁A ▁man ▁in ▁an ▁orange ▁hat .", "▁Two ▁dogs ▁run ."]
wanted = served.translate(lines, batch_size=1)
for use in {uses}:
    child = os.fork()
    if child == 0:
        for _ in range(16):  # they take the places of its parent's
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        try:
            exec(use)
            gc.collect()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        sys.exit(0)
    deadline, ended = time.monotonic() + float(seconds), 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    print(repr(use), os.waitstatus_to_exitcode(status), os.path.exists(report), flush=True)
print(served.translate(lines, batch_size=1) == wanted)
served.close()
print(os.path.exists(report))
"""


def run_program(folder: Path, ranks: int, uses: list[str], report: Path) -> list[str]:
    """What it prints, by lines."""
    program = PROGRAM.format(uses=uses)
    arguments = (folder / "checkpoint_last.pt", folder / "data-bin", ranks, report, SECONDS)
    done = processes.run([sys.executable, "-c", program, *arguments], env=commands.environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_forked_childs_calls_are_refused_and_its_end_is_its_own(shared_goldens, tmp_path):
    uses = ["served.translate(lines)", "served.close()", "del served", "pass"]
    assert run_program(shared_goldens / "mt_plain", 2, uses, tmp_path / "report.json") == [
        "ExchangeError translate() must be called in the process that loaded the model, got its forked child",
        "'served.translate(lines)' 0 False",
        "'served.close()' 0 False",
        "'del served' 0 False",
        "'pass' 0 False",
        "True",
        "True",
    ]


def test_a_forked_child_of_one_process_leaves_report_and_trace_to_it(shared_goldens, tmp_path):
    uses = ["pass", "del served", "assert served.translate(lines, batch_size=1) == wanted"]
    assert run_program(shared_goldens / "mt_plain", 1, uses, tmp_path / "report.json") == [
        *(f"{use!r} 0 False" for use in uses),
        "True",
        "True",
    ]
