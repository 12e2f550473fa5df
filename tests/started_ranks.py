"""Ranks that translate for a while, to be ended in the middle: started by hand or by torchrun, and cleared away."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import commands
from processes import Process
from rank_commands import arguments_of

TIMEOUT = 30  # seconds in which all others must have ended
START = 120  # seconds until the first translation, on a slow machine
# one sentence after another, each for long: time to be killed in
LONG = ("--batch-size", "1", "--beam", "40", "--model-overrides", repr(commands.NLLB_OVERRIDES))


class Started:
    """Processes that translate into one file, what they say in one file each; none is left behind."""

    def __init__(self, goldens: Path, folder: Path, *flags):
        self.folder = folder
        self.arguments = arguments_of(goldens, "mt_nllb_ws2", *LONG, "--results-path", folder / "results", *flags)
        self.processes: list[subprocess.Popen | Process] = []
        self.user_dir = commands.USER_DIR

    def start(self, ranks: int | None = None, **environment: str) -> None:
        """`ranks` as torchrun's own children, whose numbers the tests look for; without, a fork."""
        command = commands.command_line("generate", *self.arguments, ranks=ranks, user_dir=self.user_dir)
        file, environment = self.folder / f"{len(self.processes)}.err", commands.environment(**environment)
        with open(file, "w", encoding="utf-8") as errors, open(os.devnull, "r+b") as nothing:
            if ranks is None:
                streams = (nothing.fileno(), nothing.fileno(), errors.fileno())
                self.processes.append(Process(command, streams, env=environment))
            else:
                self.processes.append(subprocess.Popen(command, stdout=nothing, stderr=errors, env=environment))

    def start_by_hand(self, ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            self.start(RANK=str(rank), **meeting)

    def wait_for_a_translation(self) -> None:
        deadline = time.monotonic() + START
        while "\nH-" not in self.results():
            assert time.monotonic() < deadline and all(process.poll() is None for process in self.processes), [
                self.said(number)[-3000:] for number in range(len(self.processes))
            ]
            time.sleep(0.1)

    def results(self) -> str:
        file = self.folder / "results" / "generate-test.txt"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def said(self, number: int) -> str:
        return (self.folder / f"{number}.err").read_text(encoding="utf-8")

    def all_end(self, but: int | None = None) -> list[int]:
        """Their exit codes, which must come in time."""
        deadline = time.monotonic() + TIMEOUT
        others = [process for number, process in enumerate(self.processes) if number != but]
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in others]

    def kill(self) -> None:
        """Those that a failed test has left."""
        left = [child for process in self.processes for child in children_of(process.pid)]
        for process in self.processes:
            process.kill()
            process.wait()
        for child in left:
            _kill_if_there(child)


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def rank_of(pid: int) -> int | None:
    """What the environment of a process says, None where it is no rank."""
    try:
        found = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return None
    return None if found is None else int(found.group(1))


def _kill_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def assert_incomplete(started: Started) -> None:
    results = started.results()
    assert "\nH-" in results and "Generate test" not in results
