"""Real processes over gloo that live for a whole test file and run the tests' functions as ranks."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import Pipe, current_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from processes import Process

TIMEOUT = 120  # seconds that a rank may take for one call
PROGRAM = """
import json, sys
path, key, group, rank, world_size = sys.argv[1:]
sys.path[:] = json.loads(path)
import rank_group
rank_group.serve(key, group, int(rank), int(world_size))
"""


class RankGroup:
    """R processes in one group of torch.distributed."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        group = str(Path(self._folder.name) / "group")
        key = current_process().authkey.hex()  # tensors are sent by multiprocessing's own servers
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("RANK", None)
        self._ends, self._processes = [], []
        for rank in range(self.world_size):
            ours, theirs = Pipe()
            command = [sys.executable, "-c", PROGRAM, json.dumps(sys.path), key, group, rank, self.world_size]
            self._processes.append(Process(command, (theirs.fileno(), 1, 2), env=environment))
            theirs.close()
            self._ends.append(ours)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(rank, world_size, *arguments)` on every rank at once; their results by rank.

        Where a rank fails all are started anew, since the others may wait for it.
        """
        for end in self._ends:
            end.send((function, arguments))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(results) < self.world_size:
            waiting = {end: rank for rank, end in enumerate(self._ends) if rank not in results}
            answered = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not answered:
                self._restart()
                raise AssertionError(f"ranks {list(waiting.values())} hang in {function.__name__}")
            for end in answered:
                fault, results[waiting[end]] = end.recv()
                if fault is not None:
                    self._restart()
                    raise AssertionError(f"rank {waiting[end]} of {self.world_size} failed:\n{fault}")
        return [results[rank] for rank in range(self.world_size)]

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


@contextmanager
def ranks(world_size: int):
    group = RankGroup(world_size)
    try:
        yield group
    finally:
        group.close()


def serve(key: str, group: str, rank: int, world_size: int) -> None:
    """What a rank runs: stdin is its end of the connection."""
    current_process().authkey = bytes.fromhex(key)
    end = Connection(os.dup(0))
    dist.init_process_group(
        "gloo", init_method=f"file://{group}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((None, function(rank, world_size, *arguments)))
        except Exception:
            end.send((traceback.format_exc(), None))
