"""What a rank leaves word of before it breaks off, and what the others make of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

WORD = 10_000  # characters
KEY = "moe_fault/{}"  # of a rank's word in the group's store


class ExchangeError(RuntimeError):
    """The other ranks could not be reached; fault: what one of them has left word of, if any has."""

    def __init__(self, message: str, fault: str | None = None):
        super().__init__(message)
        self.fault = fault


def interruption(number: int) -> BaseException:
    """What ends a process after signal `number`: KeyboardInterrupt, or SystemExit with code 128 + number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def leave_word(rank: int, fault: str) -> None:
    """For the other ranks of the group."""
    with suppress(RuntimeError):  # the store may have gone with the rank that keeps it
        _store().set(KEY.format(rank), fault[:WORD].encode(errors="replace"))  # the store ends over values of 8 MiB


def word_left(world_size: int) -> str | None:
    """Of the first rank that has left one."""
    with suppress(RuntimeError):
        for key in map(KEY.format, range(world_size)):
            if _store().check([key]):
                return _store().get(key).decode()
    return None


@contextmanager
def naming_the_fault(world_size: int) -> Iterator[None]:
    """What torch.distributed raises becomes an ExchangeError, by the word of the rank that broke off."""
    try:
        yield
    except RuntimeError as error:
        fault = word_left(world_size)
        raise ExchangeError(f"the exchange between the ranks broke off: {fault or error}", fault) from error


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
