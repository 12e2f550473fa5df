"""A signal to several ranks that serve: one report and one trace of what all served, and no rank is left behind."""

import os
import signal
from pathlib import Path

import pytest
from rank_commands import Told, telling
from started_ranks import Started, assert_incomplete, children_of, rank_of


@pytest.fixture
def started(shared_goldens, tmp_path):
    started = Started(shared_goldens, tmp_path, *telling(tmp_path))
    yield started
    started.kill()


def assert_told_of_all(started: Started, said: str, signal_to: str) -> None:
    """What two ranks had served when they broke off."""
    told = Told.read(started.folder)
    assert [rank["rank"] for rank in told.report["ranks"]] == [0, 1]
    assert told.report["world_size"] == 2 and all(rank["tokens"] > 0 for rank in told.report["ranks"])
    assert {number % 2 for number in told.trace["decode"].batch} == {0, 1}
    assert len(told.trace["decode"].batch) == told.report["decoder"]["steps"]
    assert said.count("served: ") == said.count("interrupted by ") == 1
    assert f"interrupted by {signal_to}: report and trace are of the passes before" in said
    assert "lacks rank" not in said and "Translated" not in said
    assert not list(started.folder.glob(".*"))
    assert_incomplete(started)


@pytest.mark.parametrize(
    ("number", "to", "code"),
    [
        (signal.SIGTERM, (0, 1), 143),
        pytest.param(signal.SIGTERM, (1,), 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, (0,), 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, (0, 1), -signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_ranks_with_one_report_and_trace(started, number, to, code):
    started.start_by_hand(2)
    started.wait_for_a_translation()
    for rank in to:
        started.processes[rank].send_signal(number)
    assert started.all_end() == [code, code]
    name = signal.Signals(number).name
    first = next(rank for rank in (0, 1) if f"{name} to rank {rank} of 2" in started.said(0))
    assert first in to
    assert_told_of_all(started, started.said(0), f"{name} to rank {first} of 2")
    assert "Traceback" not in started.said(1) and "served" not in started.said(1).replace("ranks serve", "")


@pytest.mark.slow
@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_signal_to_the_launcher_ends_its_ranks(started, by_torchrun):
    if not by_torchrun:
        started.arguments = (*started.arguments, "--distributed-world-size", "2")
    started.start(ranks=2 if by_torchrun else None)
    started.wait_for_a_translation()
    pids = [child for child in children_of(started.processes[0].pid) if rank_of(child) is not None]
    assert len(pids) == 2
    started.processes[0].send_signal(signal.SIGTERM)
    (code,) = started.all_end()
    assert code == 143 or by_torchrun and code != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    first = 1 if "SIGTERM to rank 1 of 2" in started.said(0) else 0
    assert_told_of_all(started, started.said(0), f"SIGTERM to rank {first} of 2")


def test_rank_0_writes_its_own_part_where_the_others_are_gone(started):
    started.start_by_hand(2)
    started.wait_for_a_translation()
    os.kill(started.processes[1].pid, signal.SIGSTOP)
    started.processes[0].send_signal(signal.SIGTERM)
    started.processes[1].kill()
    assert started.all_end(but=1) == [1]
    told, said = Told.read(started.folder), started.said(0)
    assert [rank["rank"] for rank in told.report["ranks"]] == [0]
    assert {number % 2 for number in told.trace["decode"].batch} == {0}
    assert len(told.trace["decode"].batch) == told.report["decoder"]["steps"] > 0
    for what in ("report", "trace"):
        assert said.count(f"the {what} lacks rank 1 of 2, which had ended") == 1
    assert "rank 0 of 2 ends: rank 1 of 2 vanished" in said
    assert_incomplete(started)
