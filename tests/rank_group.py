"""Real processes over gloo that live for a whole test file and run the tests' functions as ranks."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds that a rank may take for one call


class RankGroup:
    """R processes in one group of torch.distributed."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, str(Path(self._folder.name) / "group"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(rank, world_size, *arguments)` on every rank at once; their results by rank.

        Where a rank fails all are started anew, since the others may wait for it.
        """
        for end in self._ends:
            end.send((function, arguments))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + PATIENCE
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
            process.join()
        self._folder.cleanup()


@contextmanager
def ranks(world_size: int):
    group = RankGroup(world_size)
    try:
        yield group
    finally:
        group.close()


def _serve(rank: int, world_size: int, file: str, end) -> None:
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
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
