"""What a forked child of a process that serves must do without."""

import os
from functools import lru_cache

import torch


@lru_cache
def compute_alone_after_forks() -> None:
    """From here on a forked child of this process computes with one thread; a second call changes nothing.

    The threads of PyTorch's OpenMP do not survive a fork, and its first product in a child would wait for them for
    ever; PyTorch's data loaders do the same for their workers. `torch.set_num_threads` stays the child's own to call.
    """
    os.register_at_fork(after_in_child=_compute_alone)


def _compute_alone() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
