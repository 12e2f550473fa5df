"""What `fairseq-moe simulate` says of a run by the clocks of buffering/replay.py, for sizes, policies and prefetchers.

Every row stands beside three bounds: `resident_seconds`, where every expert is resident; `disk_seconds`, what the disk
alone needs for the misses; and the prefetchers `off` and `oracle`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from fairseq_moe_ext.atomic_file import new_file
from fairseq_moe_ext.buffering.eviction import POLICIES, Buffer
from fairseq_moe_ext.buffering.foresight import Foresight
from fairseq_moe_ext.buffering.model_calls import ModelCall
from fairseq_moe_ext.buffering.prefetchers import HotSet, LastStep, NextLayers, Nothing, Oracle, Prefetcher
from fairseq_moe_ext.buffering.rates import Costs, Rates
from fairseq_moe_ext.buffering.replay import replay
from fairseq_moe_ext.buffering.simulation import MIN

PREFETCHERS = ("off", "layers", "last-step", "hot-set", "oracle")
ALL_PHASES = "all"
AHEAD_SHARE = 8  # as buffering/slot_pool.py has it, which needs PyTorch
COLUMNS = (
    "size", "policy", "prefetch", "phase", "calls", "accesses", "misses", "seconds", "waited_seconds",
    "resident_seconds", "disk_seconds", "bytes_read", "bytes_in_vain",
)  # fmt: skip


@dataclass(frozen=True)
class Slots:
    """Beside those of the buffers: staging, for experts on their way; ahead, for prefetched ones, None: one for eight
    that are kept, as it is served. alone: whether a prefetch begins only while no needed copy is on its way, as it is
    served."""

    staging: int = 4
    ahead: int | None = None
    alone: bool = True

    def ahead_of(self, buffers: Mapping[str, Buffer | Foresight], calls: Sequence[ModelCall]) -> int:
        """For these buffers; none are needed where all is kept."""
        if self.ahead is not None:
            return self.ahead
        numbers = {call.layer: len(call.load) for call in calls}
        kept = sum(buffer.size for buffer in buffers.values())
        return min(max(1, kept // AHEAD_SHARE), sum(numbers.values()) - kept)


def prefetcher_named(name: str, calls: Sequence[ModelCall], totals: Mapping[str, np.ndarray]) -> Prefetcher:
    """One of PREFETCHERS for a run's calls; totals: of `hot-set`, each layer's load (E,) in another run."""
    if name == "off":
        return Nothing()
    if name == "hot-set":
        return HotSet(calls, totals)
    return {"layers": NextLayers, "last-step": LastStep, "oracle": Oracle}[name](calls)


def buffers_for(
    calls: Sequence[ModelCall], size: int | None, policy: str, order: str, rankings: Mapping[str, Sequence[int]]
) -> dict[str, Buffer | Foresight]:
    """A buffer of `size` experts for every layer, or of all that it has; None: of a quarter of them. rankings: by
    layer, whose first are resident at the start, and who goes first among equals; else those of the lowest numbers."""
    of_layer: dict[str, list[ModelCall]] = {}
    for call in calls:
        of_layer.setdefault(call.layer, []).append(call)
    found: dict[str, Buffer | Foresight] = {}
    for layer, its in of_layer.items():
        number = len(its[0].load)
        kept = min(max(1, number // 4) if size is None else size, number)
        initial = list(rankings.get(layer, range(number)))[:kept]
        if policy == MIN:
            found[layer] = Foresight([call.active() for call in its], kept, initial)
        else:
            found[layer] = Buffer(kept, policy, order, initial, rankings.get(layer, ()))
    return found


def row(size: int, policy: str, prefetch: str, phase: str, costs: Costs, rates: Rates) -> tuple:
    """As COLUMNS has it."""
    seconds = (costs.seconds, costs.waited, costs.resident, rates.least_reading(costs.misses))
    read = (int(costs.reads * rates.expert_bytes), int(costs.in_vain * rates.expert_bytes))
    counts = (costs.calls, costs.accesses, costs.misses)
    return size, policy, prefetch, phase, *counts, *(round(float(each), 6) for each in seconds), *read


def replay_rows(
    calls: Sequence[ModelCall],
    rates: Rates,
    sizes: Iterable[int],
    policies: Iterable[str],
    prefetches: Iterable[str],
    order: str,
    slots: Slots,
    totals: Mapping[str, np.ndarray],
    rankings: Mapping[str, Sequence[int]],
    of_phase: Mapping[str, Rates],
) -> list[tuple]:
    """Rows of every combination, of each phase and of all together."""
    found = []
    for size in sizes:
        for policy in policies:
            for prefetch in prefetches:
                buffers = buffers_for(calls, size, policy, order, rankings)
                prefetcher = prefetcher_named(prefetch, calls, totals)
                in_turn = order == "ascending" and policy != MIN
                ahead = slots.ahead_of(buffers, calls)
                played = {"in_turn": in_turn, "of_phase": of_phase, "alone": slots.alone}
                phases = replay(calls, buffers, rates, prefetcher, slots.staging, ahead, **played)
                phases[ALL_PHASES] = sum(phases.values(), Costs())
                found += [row(size, policy, prefetch, phase, each, rates) for phase, each in phases.items()]
    return found


def write_replay(
    folder: Path, rows: Sequence[tuple], rates: Rates, slots: Slots, of_phase: Mapping[str, Rates]
) -> None:
    """replay.csv and replay.json in `folder`."""
    with new_file(folder / "replay.csv", text=True) as opened:
        csv.writer(opened).writerows([COLUMNS, *rows])
    named = [dict(zip(COLUMNS, each, strict=True)) for each in rows]
    said = {"rates": {**asdict(rates), **asdict(slots)}, "rows": named}
    if of_phase:
        said["rates_of_phases"] = {phase: asdict(each) for phase, each in of_phase.items()}
    with new_file(folder / "replay.json", text=True) as opened:
        json.dump(said, opened, indent=1)


def in_words(rows: Sequence[tuple]) -> str:
    """The rows of all phases together."""
    wanted = ("size", "policy", "prefetch", *COLUMNS[6:])
    places = [COLUMNS.index(name) for name in wanted]
    shown = [[each[place] for place in places] for each in rows if each[3] == ALL_PHASES]
    return tabulate(shown, wanted, tablefmt="plain")


def policy_names() -> tuple[str, ...]:
    """What may be replayed: the policies that are served, and the one that knows the future."""
    return (*POLICIES, MIN)
