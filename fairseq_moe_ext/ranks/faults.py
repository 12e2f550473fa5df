"""How ranks end that can do nothing together any more."""

from __future__ import annotations

import signal


class ExchangeError(RuntimeError):
    """The other ranks could not be reached; fault: what one of them has left word of, if any has."""

    def __init__(self, message: str, fault: str | None = None):
        super().__init__(message)
        self.fault = fault


def interruption(number: int) -> BaseException:
    """What ends a process after signal `number`: KeyboardInterrupt, or SystemExit with code 128 + number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
