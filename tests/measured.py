"""What a call takes: seconds, and the memory beyond what its process had before, in a forked process of its own."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS, MEMORY = 5, 64_000_000  # of any call; besides, 1.2 times the bytes of its file
_PROCESS_SECONDS = 60  # of processor time: after that it hangs


@dataclass(frozen=True)
class Taken:
    """How a call ended. error: the type's name and message of what it raised, else None; seconds: processor time."""

    error: tuple[str, str] | None
    seconds: float
    memory: int


def measured(call: Callable[[], object]) -> Taken:
    """`call()` in a child; AssertionError where the child dies of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (_PROCESS_SECONDS, _PROCESS_SECONDS))
            signal.alarm(2 * _PROCESS_SECONDS)
            os.write(writing, pickle.dumps(_taken(call)))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the process ended with {status}"
    return pickle.loads(answer)


def _taken(call: Callable[[], object]) -> Taken:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before, start, error = _status("VmRSS"), time.process_time(), None
    try:
        call()
    except Exception as caught:
        error = type(caught).__name__, str(caught)
    return Taken(error, time.process_time() - start, _status("VmHWM") - before)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def refused_cheaply(call: Callable[[], object], size: int, *words: str) -> None:
    """`call` must end in one sentence with `words` in it, within the seconds and the memory of a file of `size`."""
    taken = measured(call)
    assert taken.error is not None, "nothing was refused"
    kind, message = taken.error
    assert kind in ("CheckpointError", "ValueError", "StoreError", "UnsupportedFieldError"), taken.error
    assert message and "\n" not in message and len(message) < 1000, message[:2000]
    for word in words:
        assert word in message, message
    assert taken.seconds < SECONDS, f"{taken.seconds:.1f} s: {message}"
    assert taken.memory < MEMORY + 1.2 * size, f"{taken.memory / 1e6:.0f} MB for {size / 1e6:.1f} MB: {message}"
