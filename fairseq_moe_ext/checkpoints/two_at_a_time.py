"""Work on tensors by two threads, so that a disk and a processor are busy at once, within a bound of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")
_THREADS = 2


def two_at_a_time(
    work: Mapping[str, Callable[[], Result]], nbytes: Mapping[str, int], room: int
) -> Iterator[Result]:
    """Do all of `work`, begun in its order; give what each returns as it ends, and the first error at once.

    nbytes: that each takes in memory; together those at work take at most `room`, but for one alone. Each thread has
    half of PyTorch's.
    """
    threads = torch.get_num_threads()
    running: dict[Future[Result], int] = {}
    pool = ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(max(threads // _THREADS, 1),))
    try:
        for name, do in work.items():
            while running and (len(running) == _THREADS or sum(running.values()) + nbytes[name] > room):
                yield from _ended(running)
            running[pool.submit(do)] = nbytes[name]
        while running:
            yield from _ended(running)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of threads that begin later


def _ended(running: dict[Future[Result], int]) -> list[Result]:
    """Of those that have ended, of which there is one; they run no more."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for each in done:
        del running[each]
    return [each.result() for each in done]
