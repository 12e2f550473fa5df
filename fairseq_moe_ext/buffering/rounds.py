"""What several ranks' experts see of a recorded routing: the calls of all ranks that fall into one round, together.

A rank takes batches r, r + R, ... and makes one call of a MoE layer per round of the exchange (ranks/exchange.py);
rank 0 prints all results in order, and has nothing to send while it waits for another rank's batch (ranks/group.py).
Nothing in that depends on time, so a trace tells every round.

Legend: R = ranks, E = experts, H = experts that a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fairseq_moe_ext.buffering.simulation import LayerLoads
from fairseq_moe_ext.trace import PHASES, PhaseTrace

Call = tuple[str, np.ndarray]  # a layer's name, its E tokens per expert


def loads_of_ranks(
    trace: Mapping[str, PhaseTrace], places: Mapping[str, Sequence[Sequence[int]]], world_size: int
) -> dict[int, list[LayerLoads]]:
    """Per rank, for every layer the loads (calls, H) of the experts that it holds, in the order of rounds.

    places: per layer the ranks of every expert, one each (a replica's share is not simulated). ValueError where they do
    not fit the trace.
    """
    rounds: dict[str, list[np.ndarray]] = {}
    for calls in _rounds(_calls_of_batches(trace), world_size):
        for name in {name for name, _ in calls}:
            together = np.sum([load for each, load in calls if each == name], axis=0, dtype=np.int64)
            rounds.setdefault(name, []).append(together)
    found: dict[int, list[LayerLoads]] = {rank: [] for rank in range(world_size)}
    for name, loads in rounds.items():
        if name not in places or len(places[name]) != len(loads[0]) or max(map(len, places[name])) > 1:
            raise ValueError(f"the placement must hold each of the {len(loads[0])} experts of {name} once")
        for rank in range(world_size):
            held = [expert for expert, ranks in enumerate(places[name]) if rank in ranks]
            of_rank = np.stack(loads)[:, held]
            found[rank].append(LayerLoads(name, of_rank[of_rank.any(axis=1)]))
    return found


def _calls_of_batches(trace: Mapping[str, PhaseTrace]) -> list[list[Call]]:
    """Every batch's calls in the order that a model makes them."""
    batches: dict[int, list[Call]] = {}
    for phase in PHASES:
        if phase in trace:
            recorded = trace[phase]
            for batch, loads in zip(recorded.batch.tolist(), recorded.load, strict=True):
                batches.setdefault(batch, []).extend(zip(recorded.names, loads, strict=True))
    return [batches.get(number, []) for number in range(max(batches) + 1)]


def _rounds(batches: Sequence[Sequence[Call]], world_size: int) -> Iterator[list[Call]]:
    """The calls of every round, those of ranks that have none left out."""
    finished, heard = [0] * world_size, [0] * world_size
    ranks = [_turns(rank, batches, finished, heard) for rank in range(world_size)]
    while True:
        calls: list[Any] = [next(rank, _DONE) for rank in ranks]
        if all(call is _DONE for call in calls):
            return
        heard[:] = finished
        yield [call for call in calls if call is not _DONE and call is not None]


_DONE = object()


def _turns(rank: int, batches: Sequence, finished: list[int], heard: list[int]) -> Iterator[Call | None]:
    """One rank's calls, round by round, None while it waits; it keeps its entry of `finished`, and reads `heard`."""
    for number, calls in enumerate(batches):
        owner, count = number % len(finished), number // len(finished) + 1
        if owner == rank:
            yield from calls
            finished[rank] = count
        elif rank == 0:
            while heard[owner] < count:
                yield None
