"""What was routed where: the load of every MoE layer at every step, recorded, saved and loaded.

Legend: L = MoE layers of a phase, E = experts. The file is a compressed .npz; per phase it holds `<phase>_names` (L,),
`<phase>_load` (steps, L, E) tokens per expert and `<phase>_batch` (steps,) the batch that each step belongs to.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# one step is: an encoder pass; a teacher-forced decoder pass (`prefill`); a decode step
PHASES = ("encoder", "prefill", "decode")


@dataclass(frozen=True)
class PhaseTrace:
    """One phase of a trace: names of L layers, load (steps, L, E) unsigned, batch (steps,) int64, rising."""

    names: tuple[str, ...]
    load: np.ndarray
    batch: np.ndarray


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
        """`load`: E tokens per expert of the layer called `name` in the current step."""
        self._current[name] = np.asarray(load, dtype=np.uint32)

    def trace(self) -> dict[str, PhaseTrace]:
        """What was recorded, only phases that had steps; loads in the smallest unsigned type that holds them."""
        phases = {}
        for phase, steps in self._steps.items():
            recorded = [(step, batch) for step, batch in zip(steps, self._batches[phase], strict=True) if step]
            if not recorded:
                continue
            names = tuple(recorded[0][0])
            load = np.stack([np.stack([step[name] for name in names]) for step, _ in recorded])
            load = load.astype(np.min_scalar_type(int(load.max())))
            phases[phase] = PhaseTrace(names, load, np.array([batch for _, batch in recorded], dtype=np.int64))
        return phases


def save_trace(path: str | os.PathLike, phases: dict[str, PhaseTrace]) -> None:
    """Write `phases` to `path`, under a temporary name first."""
    arrays = {}
    for phase, recorded in phases.items():
        arrays[f"{phase}_names"] = np.array(recorded.names)
        arrays[f"{phase}_load"] = recorded.load
        arrays[f"{phase}_batch"] = recorded.batch
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def load_trace(path: str | os.PathLike) -> dict[str, PhaseTrace]:
    """Read a trace; ValueError names the file where it is none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            phases = {
                phase: PhaseTrace(
                    tuple(arrays[f"{phase}_names"].tolist()), arrays[f"{phase}_load"], arrays[f"{phase}_batch"]
                )
                for phase in PHASES
                if f"{phase}_load" in arrays
            }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a routing trace (.npz as --moe-trace writes it): {error}") from error
    if not phases:
        raise ValueError(f"{path}: not a routing trace: none of the phases {', '.join(PHASES)} is in it")
    return phases
