"""What was routed where: the load of every MoE layer at every step, recorded, saved and loaded.

Legend: L = MoE layers of a phase, E = experts. The file is a compressed .npz; per phase it holds `<phase>_names` (L,),
`<phase>_load` (steps, L, E) tokens per expert and `<phase>_batch` (steps,) the batch that each step belongs to.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_moe_ext.atomic_file import write_bytes
from fairseq_moe_ext.bounded_json import read_regular
from fairseq_moe_ext.npz_reading import read_arrays, reason_of

# one step is: an encoder pass; a teacher-forced decoder pass (`prefill`); a decode step
PHASES = ("encoder", "prefill", "decode")
_ROOM = 50_000_000  # bytes that the arrays of any file may take; besides, a hundred times its own
_MOST, _LONGEST_NAME = 10_000, 500  # layers or experts; letters


@dataclass(frozen=True)
class PhaseTrace:
    """One phase of a trace: names of L layers, load (steps, L, E) unsigned, batch (steps,) int64, rising.

    ValueError where these do not fit together.
    """

    names: tuple[str, ...]
    load: np.ndarray
    batch: np.ndarray

    def __post_init__(self):
        expected = (*self.batch.shape, len(self.names))
        fits = self.load.ndim == 3 and self.load.shape[:2] == expected and self.load.dtype.kind == "u"
        if not self.names or not fits or self.batch.dtype.kind not in "iu":
            raise ValueError(
                f"load must be unsigned (steps, layers, experts) for {len(self.names)} layers and batch "
                f"{self.batch.shape}, got {self.load.dtype} {self.load.shape}"
            )
        if len(set(self.names)) < len(self.names) or self.load.shape[2] == 0:
            raise ValueError(
                f"the layers of a trace must have names of their own, and experts, got {', '.join(self.names)[:100]} "
                f"with {self.load.shape[2]} experts"
            )

    def in_order(self, names: tuple[str, ...]) -> PhaseTrace:
        """With its layers in the order of `names`, where these are the same layers; else as it is."""
        if sorted(names) != sorted(self.names):
            return self
        return PhaseTrace(names, self.load[:, [self.names.index(name) for name in names]], self.batch)

    def take(self, steps: np.ndarray) -> PhaseTrace:
        """These steps only; `steps`: their numbers, or which ones (steps,) bool."""
        return PhaseTrace(self.names, self.load[steps], self.batch[steps])


class TraceRecorder:
    """Collects loads step by step.

    >>> recorder = TraceRecorder()
    >>> recorder.begin_step("decode", batch=0)
    >>> recorder.add("decoder.layers.1.moe_layer", [2, 0, 1, 1])
    >>> recorder.trace()["decode"].load.tolist()
    [[[2, 0, 1, 1]]]
    """

    def __init__(self) -> None:
        self._steps: dict[str, list[dict[str, np.ndarray]]] = {phase: [] for phase in PHASES}
        self._batches: dict[str, list[int]] = {phase: [] for phase in PHASES}
        self._current: dict[str, np.ndarray] = {}

    def begin_step(self, phase: str, batch: int) -> None:
        """All loads added from here on belong to this step, until the next one begins."""
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        self._current = {}
        self._steps[phase].append(self._current)
        self._batches[phase].append(batch)

    def add(self, name: str, load: list[int]) -> None:
        """`load`: E tokens per expert of the layer called `name` in the current step; a second call's are added."""
        added = np.asarray(load, dtype=np.uint32)
        self._current[name] = added + self._current[name] if name in self._current else added

    def trace(self) -> dict[str, PhaseTrace]:
        """What was recorded, only phases that had steps; loads in the smallest unsigned type that holds them.

        A layer that was not called in a step had no tokens in it.
        """
        phases = {}
        for phase, steps in self._steps.items():
            recorded = [(step, batch) for step, batch in zip(steps, self._batches[phase], strict=True) if step]
            if not recorded:
                continue
            names = tuple(dict.fromkeys(name for step, _ in recorded for name in step))
            nothing = np.zeros_like(next(iter(recorded[0][0].values())))
            load = np.stack([np.stack([step.get(name, nothing) for name in names]) for step, _ in recorded])
            load = load.astype(np.min_scalar_type(int(load.max())))
            phases[phase] = PhaseTrace(names, load, np.array([batch for _, batch in recorded], dtype=np.int64))
        return phases


def pack_trace(phases: dict[str, PhaseTrace]) -> bytes:
    """The content of a trace's file."""
    arrays = {}
    for phase, recorded in phases.items():
        arrays[f"{phase}_names"] = np.array(recorded.names)
        arrays[f"{phase}_load"] = recorded.load
        arrays[f"{phase}_batch"] = recorded.batch
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def unpack_trace(content: bytes) -> dict[str, PhaseTrace]:
    """The phases of `pack_trace`, which may be none; ValueError where an array is not what it must be."""
    wanted = [f"{phase}_{part}" for phase in PHASES for part in ("names", "load", "batch")]
    arrays = read_arrays(content, lambda _: wanted, max(_ROOM, 100 * len(content)), kinds="iuU")
    phases = {}
    for phase in PHASES:
        names, load, batch = (arrays.get(f"{phase}_{part}") for part in ("names", "load", "batch"))
        if load is None:
            continue
        if names is None or batch is None or names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(f"{phase}_load must have names (layers,) and batches (steps,) beside it")
        phases[phase] = PhaseTrace(tuple(names.tolist()), load, batch)
        _check_numbers(phase, names, load, batch)
    return phases


def _check_numbers(phase: str, names: np.ndarray, load: np.ndarray, batch: np.ndarray) -> None:
    """ValueError where a recorder cannot have written such numbers."""
    if load.shape[0] == 0 or max(load.shape[1:]) > _MOST:
        raise ValueError(
            f"{phase}_load must be of at least one step and of at most {_MOST:,} layers and experts, got {load.shape}"
        )
    if load.max() >= 1 << 32 or batch.max() >= 1 << 63:
        raise ValueError(f"{phase}_load must be below 2^32 and {phase}_batch below 2^63")
    if not all(name.isprintable() and len(name) <= _LONGEST_NAME for name in names.tolist()):
        raise ValueError(f"{phase}_names must have at most {_LONGEST_NAME} printable letters each")


def save_trace(path: str | os.PathLike, phases: dict[str, PhaseTrace], flag: str = "") -> None:
    """Write `phases` to `path`, which the option `flag` named."""
    write_bytes(path, pack_trace(phases), flag)


def load_trace(path: str | os.PathLike) -> dict[str, PhaseTrace]:
    """Read a trace; ValueError names the file where it is none."""
    try:
        phases = unpack_trace(read_regular(path))
    except Exception as error:  # zipfile and numpy raise a dozen types at damaged files
        said = reason_of(error)
        raise ValueError(f"{path}: not a routing trace (.npz as --moe-trace writes it): {said}") from error
    if not phases:
        raise ValueError(f"{path}: not a routing trace: none of the phases {', '.join(PHASES)} is in it")
    return phases


def merge_traces(traces: Sequence[dict[str, PhaseTrace]]) -> dict[str, PhaseTrace]:
    """One trace of those that several ranks recorded, as one rank would have recorded it.

    Steps are ordered by batch; within a batch they keep their rank's order. ValueError where a batch was recorded by
    two ranks, or where they recorded different layers or numbers of experts.
    """
    phases = {}
    for phase in PHASES:
        parts = [trace[phase] for trace in traces if phase in trace]
        if not parts:
            continue
        parts = [part.in_order(parts[0].names) for part in parts]
        for part in parts[1:]:
            if part.names != parts[0].names or part.load.shape[2] != parts[0].load.shape[2]:
                raise ValueError(
                    f"traces to merge must be of one model; their {phase} phases have {_describe(parts[0])} "
                    f"and {_describe(part)}"
                )
        numbers, ranks = np.unique(np.concatenate([np.unique(part.batch) for part in parts]), return_counts=True)
        if (ranks > 1).any():
            raise ValueError(
                f"traces to merge must not share a batch; {ranks.max()} of them hold batch "
                f"{numbers[ranks.argmax()]} of the {phase} phase"
            )
        batch = np.concatenate([part.batch for part in parts])
        merged = PhaseTrace(parts[0].names, np.concatenate([part.load for part in parts]), batch)
        phases[phase] = merged.take(np.argsort(batch, kind="stable"))
    return phases


def _describe(part: PhaseTrace) -> str:
    return f"{part.load.shape[2]} experts in {', '.join(part.names)}"


def slice_trace(trace: dict[str, PhaseTrace], first: int, last: int) -> dict[str, PhaseTrace]:
    """The batches numbered from `first` to before `last`; a phase without any of them is left out."""
    phases = {phase: part.take((part.batch >= first) & (part.batch < last)) for phase, part in trace.items()}
    return {phase: part for phase, part in phases.items() if len(part.batch)}


def halve_trace(trace: dict[str, PhaseTrace]) -> tuple[dict[str, PhaseTrace], dict[str, PhaseTrace]]:
    """The first and the second half of each phase's batches; of an odd number the first half has one more.

    ValueError where a phase has fewer than two batches.
    """
    first, second = {}, {}
    for phase, part in trace.items():
        batches = np.unique(part.batch)
        if len(batches) < 2:
            raise ValueError(f"a trace to split must have at least 2 batches, got {len(batches)} in its {phase} phase")
        fits = part.batch < batches[(len(batches) + 1) // 2]
        first[phase], second[phase] = part.take(fits), part.take(~fits)
    return first, second
