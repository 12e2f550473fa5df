"""Real processes over gloo that live for a whole test file and run the tests' functions as ranks."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds that a rank may take for one call


class RankGroup:
    """R processes in one group of torch.distributed."""

    def __init__(self, world_size: int, folder: Path):
        self.world_size = world_size
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, str(folder / "group"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(rank, world_size, *arguments)` on every rank at once; their results by rank."""
        for end in self._ends:
            end.send((function, arguments))
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(PATIENCE):
                raise AssertionError(f"rank {rank} of {self.world_size} hangs in {function.__name__}")
            answers.append(end.recv())
        for rank, (fault, _) in enumerate(answers):
            if fault is not None:
                raise AssertionError(f"rank {rank} of {self.world_size} failed:\n{fault}")
        return [result for _, result in answers]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


@contextmanager
def ranks(world_size: int):
    with tempfile.TemporaryDirectory() as folder:
        group = RankGroup(world_size, Path(folder))
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
