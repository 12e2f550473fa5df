"""How much memory a computation's tensors take at their peak."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

for _name, _level in (("TORCH_CPP_LOG_LEVEL", "ERROR"), ("KINETO_LOG_LEVEL", "99")):  # the profiler is talkative
    os.environ.setdefault(_name, _level)

from torch.profiler import ProfilerActivity, profile  # noqa: E402


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of main memory that `call`'s tensors took at a time, above what was there before.

    By the allocations that PyTorch's profiler saw: exact, whatever the process holds besides.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
