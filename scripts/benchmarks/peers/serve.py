"""A peer's process: told over its standard input what to prepare and which call to time, it answers on its output.

One JSON object a line. {"prepare": {...}} -> {"calls": [names], "left_out": {name: why}, "facts": {...}};
{"call": name} -> {"seconds": s}; an "error" where one of them fails. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Prepared:
    """calls: by name what is timed; has run once. left_out: by name why it is not. facts: for the table, as JSON."""

    calls: dict[str, Callable[[], Any]]
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def serve(prepare: Callable[[dict], Prepared]) -> None:
    """Answer until the input ends."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepared = Prepared({})
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if "prepare" in request:
                    prepared = Prepared({})  # lets go of the last one's memory
                    prepared = prepare(request["prepare"])
                    answer = {"calls": list(prepared.calls), "left_out": prepared.left_out, "facts": prepared.facts}
                else:
                    answer = {"seconds": _seconds(prepared.calls[request["call"]])}
            except (RuntimeError, MemoryError, AssertionError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(answer), file=answers)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def available_bytes() -> int:
    """Of memory, without pushing anything out."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def without_room(needs: dict[str, int]) -> dict[str, str]:
    """By name, why calls that take so many bytes do not run on this machine."""
    room = int(0.8 * available_bytes())
    return {
        name: f"takes {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free" for name, need in needs.items() if need > room
    }
