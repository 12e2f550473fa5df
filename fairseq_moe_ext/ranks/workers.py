"""Ranks that a program starts by itself: workers on this machine, to which it forwards its calls.

The program is rank 0. A worker (serving/worker.py) is a fresh interpreter that reads calls from its standard input, in
JSON, and ends with it: when the model is closed, or with the program.
Legend: R = ranks (the world size).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fairseq_moe_ext.ranks.calls import Call
from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.forks import tell_of_forks
from fairseq_moe_ext.ranks.process_group import GRACE, TIMEOUT, RankGroup
from fairseq_moe_ext.ranks.program import ProgramRanks

HOST = "127.0.0.1"
MODULE = "fairseq_moe_ext.serving.worker"
CLOSE = "close"  # the call that is no method with arguments
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Order:
    """What a worker is told first. port: of the store where the ranks meet. device: its GPU's number, None on a CPU.
    load: what `load` is told.
    """

    port: int
    rank: int
    world_size: int
    device: int | None
    load: dict[str, Any]

    def join(self) -> ProgramRanks:
        """The worker's end of the ranks."""
        store = dist.TCPStore(HOST, self.port, self.world_size, is_master=False, timeout=TIMEOUT)
        store.set(f"started/{self.rank}", b"1")
        if self.device is not None:
            torch.cuda.set_device(self.device)
        return ProgramRanks(_group(store, self.rank, self.world_size, self.device is not None), self.device is None)


class StartedRanks(ProgramRanks):
    """Rank 0 of R, whose other ranks are workers of its own."""

    def __init__(self, world_size: int, cpu: bool, load: Mapping[str, Any]):
        """load: what `load` was told. ValueError where it cannot be sent to workers or GPUs are too few for all;
        ExchangeError where a worker ends before it serves."""
        devices = _devices(world_size, cpu)
        plain = json.loads(_line(load))
        store = dist.TCPStore(HOST, 0, world_size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        self._workers: list[subprocess.Popen] = []
        tell_of_forks(self)
        try:
            for rank in range(1, world_size):
                self._workers.append(_start(world_size))
                self._tell(self._workers[-1], asdict(Order(store.port, rank, world_size, devices[rank], plain)))
            self._wait_for_start(store)
            super().__init__(_group(store, 0, world_size, devices[0] is not None), cpu)
        except BaseException:
            self._end_workers()
            raise

    @contextmanager
    def call(self, name: str, arguments: Mapping[str, Any]) -> Iterator[Call]:
        """As `ProgramRanks.call`; the started ranks are told of every call but of loading, which they know."""
        self._check_usable(name)
        if name != "load":  # of which they know
            line = _line([name, dict(arguments)])
            for worker in self._workers:
                self._tell(worker, line)
        with super().call(name, arguments) as call:
            yield call

    def after_fork(self) -> None:
        """In a forked child: the pipes by which workers see that the program has ended are its parent's alone."""
        nothing = os.open(os.devnull, os.O_RDONLY)
        for worker in self._workers:
            if not worker.stdin.closed:
                os.dup2(nothing, worker.stdin.fileno(), inheritable=False)
        os.close(nothing)

    def _end(self, *args, **kwargs) -> None:
        """The started ranks are ended, too."""
        try:
            super()._end(*args, **kwargs)
        finally:
            self._end_workers()
            self._group.forget_store()

    def _wait_for_start(self, store: dist.Store) -> None:
        while missing := [rank for rank in range(1, len(self._workers) + 1) if not store.check([f"started/{rank}"])]:
            for rank in missing:
                code = self._workers[rank - 1].poll()
                if code is not None:
                    fault = f"rank {rank} of {len(self._workers) + 1} ended with code {code} before it served"
                    raise ExchangeError(f"load() broke off: {fault}", fault)
            time.sleep(0.05)

    def _tell(self, worker: subprocess.Popen, content: Any) -> None:
        with suppress(OSError):  # it has ended, which the call will find
            worker.stdin.write((content if isinstance(content, str) else _line(content)).encode())
            worker.stdin.flush()

    def _end_workers(self) -> None:
        """They end with their standard input; one that does not is killed."""
        for worker in self._workers:
            with suppress(OSError):
                worker.stdin.close()
        deadline = time.monotonic() + GRACE
        for worker in self._workers:
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _group(store: dist.Store, rank: int, world_size: int, cuda: bool) -> RankGroup:
    return RankGroup(dist.PrefixStore("group", store), rank, world_size, cuda)


def _devices(world_size: int, cpu: bool) -> list[int | None]:
    """Per rank its GPU; the program keeps the one that it has chosen."""
    if cpu or not torch.cuda.is_available():
        return [None] * world_size
    count, own = torch.cuda.device_count(), torch.cuda.current_device()
    if world_size > count:
        raise ValueError(
            f"distributed_world_size must be at most the number of GPUs, {count}, got {world_size}; cpu=True serves "
            "without them"
        )
    return [own, *(device for device in range(count) if device != own)][:world_size]


def _start(world_size: int) -> subprocess.Popen:
    path = os.pathsep.join([str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // world_size)))
    return subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # what interrupts the program is the program's
    )


def _line(content: Any) -> str:
    """ValueError where it is no plain data."""

    def plain(value: Any) -> str:
        return os.fspath(value) if isinstance(value, os.PathLike) else _refuse(value)

    return json.dumps(content, default=plain) + "\n"


def _refuse(value: Any) -> NoReturn:
    raise ValueError(f"what several ranks are told must be texts, numbers, lists and mappings, got {value!r:.60}")
