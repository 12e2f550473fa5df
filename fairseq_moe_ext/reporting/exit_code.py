"""The exit code of a command that has given out its results and then could not do the rest."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress


class ExitCode:
    """Lets this process go on after a failure and end with exit code 1, when all that is registered later has run."""

    def __init__(self) -> None:
        self._failed = False
        atexit.register(self._leave)

    def fail(self, message: str) -> None:
        """Say so now."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        self._failed = True

    def _leave(self) -> None:
        if self._failed:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(1)  # nothing else changes the exit code of a process that has come to its end
