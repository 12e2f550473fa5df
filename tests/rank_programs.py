"""Programs that are started as ranks by hand, each a process of its own, and what they said."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import commands
import processes


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
