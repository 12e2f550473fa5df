"""One call of a served model, which all ranks make: what they agree on before, and what they share after."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fairseq_moe_ext.ranks.faults import ExchangeError

if TYPE_CHECKING:
    from fairseq_moe_ext.ranks.program import ProgramRanks


class OneCall:
    """A call of one process."""

    def preparing(self) -> nullcontext:
        """Around what may fail on one rank: nothing, for one process."""
        return nullcontext()

    def share(self, found: Any) -> list[Any]:
        """`found` of every rank, by rank: of this one."""
        return [found]


class Call:
    """One call of all ranks. in_step: whether an error that is raised now leaves the ranks where they can go on."""

    def __init__(self, ranks: ProgramRanks, name: str, arguments: Mapping[str, Any]):
        self.in_step = False
        self._ranks, self._name, self._arguments = ranks, name, arguments

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around what every rank does by itself before they compute together; at its end they agree.

        ValueError where the call is another one on another rank; ExchangeError where this failed on another rank.
        """
        error = None
        try:
            yield
        except Exception as found:
            error = found
        said = None if error is None else f"{type(error).__name__}: {error}"
        arguments = {name: _described(value) for name, value in self._arguments.items()}
        told = self._ranks.gather([self._name, arguments, said])
        self.in_step = True
        errors = [error for _, _, error in told]
        if None in errors:  # else each has its own to tell
            _check_same(told)
        if error is not None:
            raise error
        failed = next((rank for rank, each in enumerate(errors) if each is not None), None)
        if failed is not None:
            fault = f"rank {failed} of {self._ranks.world_size} failed: {errors[failed]}"
            raise ExchangeError(f"{self._name}() broke off: {fault}", fault)
        self.in_step = False

    def share(self, found: Any) -> list[Any]:
        """What came of each rank's batches, plain data, by rank; with it the call is over."""
        everything = self._ranks.gather(found)
        self.in_step = True
        return everything


def _described(value: Any) -> list[str]:
    """[what is equal for equal values, what people are shown]."""
    plain = list(value) if isinstance(value, tuple) else value
    try:
        text = json.dumps(plain, sort_keys=True, default=_plain)
    except (TypeError, ValueError):
        text = repr(plain)
    shown = f"{len(plain)} texts" if isinstance(plain, list) and plain and isinstance(plain[0], str) else repr(plain)
    return [hashlib.sha256(text.encode()).hexdigest(), shown if len(shown) <= 60 else f"{shown[:60]} ..."]


def _plain(value: Any) -> str:
    return os.fspath(value) if isinstance(value, os.PathLike) else repr(value)


def _check_same(told: list[list]) -> None:
    """ValueError, on every rank alike, where they do not make the same call."""
    (first, wanted, *_), *others = told
    for rank, (name, arguments, *_) in enumerate(others, 1):
        if name != first:
            raise ValueError(f"all ranks must make the same call, got {first}() on rank 0 and {name}() on rank {rank}")
        for argument in [*wanted, *arguments]:
            values = [each.get(argument, ["", "none"]) for each in (wanted, arguments)]
            if values[0][0] != values[1][0]:
                other = " others" if values[0][1] == values[1][1] else ""
                raise ValueError(
                    f"{argument} must be the same on all ranks, got {values[0][1]} on rank 0 and "
                    f"{values[1][1]}{other} on rank {rank}"
                )
