"""What a forked child has of its parent's ranks, and must leave to it: their connections and their threads.

The child shares the sockets and pipes, so that whatever it said would be taken for its parent's word; and it has none
of the threads for which whoever frees a store or a process group waits.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol


class Forked(Protocol):
    """What has something to leave to its parent."""

    def after_fork(self) -> None:
        """In a forked child, at its start."""


def tell_of_forks(owner: Forked) -> None:
    """Call `owner.after_fork()` in every child that this process forks, for as long as `owner` lives."""
    _owners.add(owner)


def never_free(thing: Any) -> None:
    """Keep `thing` for as long as this process lives."""
    _kept.append(thing)


_owners: weakref.WeakSet[Forked] = weakref.WeakSet()
_kept: list[Any] = []  # in children alone


def _tell_all() -> None:
    for owner in list(_owners):
        owner.after_fork()


os.register_at_fork(after_in_child=_tell_all)
