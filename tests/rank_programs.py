"""Programs that serve from several ranks: started by hand, each a process of its own; what they said and found."""

from __future__ import annotations

import atexit
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import commands
import processes
import pytest
import torch.distributed as dist


def run_ranks(program: Iterable[object], ranks: int, **environment: str) -> list[subprocess.CompletedProcess]:
    """`python <program>` on every rank, in the environment that torchrun gives, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), **environment}
    command = [sys.executable, *program]
    with ThreadPoolExecutor(ranks) as pool:
        started = [
            pool.submit(processes.run, command, env=commands.environment(**meeting, RANK=str(rank)), timeout=120)
            for rank in range(ranks)
        ]
        return [each.result() for each in started]


def assert_same(found: list, wanted: list) -> None:
    """Texts equal, scores up to what experts on other ranks round otherwise."""
    for sentence, expected in zip(found, wanted, strict=True):
        assert [each.words for each in sentence] == [each.words for each in expected]
        for each, one in zip(sentence, expected, strict=True):
            assert (each.text, each.alignment) == (one.text, one.alignment)
            assert each.score == pytest.approx(one.score, abs=1e-4)
            assert each.positional_scores == pytest.approx(one.positional_scores, abs=1e-4)


def state_of_process() -> tuple:
    """What a program has of its own, which serving leaves alone."""
    handlers = tuple(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))
    return sys.excepthook, sys.stdout, handlers, atexit._ncallbacks(), dist.group.WORLD


def error_of(call) -> tuple[str, str] | None:
    """(kind, text) of what `call` raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None
