"""A model in every format: its bytes, what a step and a pass read of them, and the flags for memories of usual sizes.

Legend: E = experts of a layer, N = experts of a layer in a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from fairseq_moe_ext.experts.formats import FLOAT
from fairseq_moe_ext.serving.memory_plan import ModelSizes, Setting, Workload, plan

MEMORIES = (8, 16, 24, 32, 64)  # GiB
SENTENCES = (1, 8, 32)  # of a decode step
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Stored:
    """experts: one of FORMATS. element: bytes of a number of the dense part, and of experts that are floats.
    int8_dense: whether the dense part lies in int8."""

    name: str
    experts: str
    element: int
    int8_dense: bool = False


STORED = (
    Stored("float32", FLOAT, 4),
    Stored("float16", FLOAT, 2),
    Stored("int8, dense float16", "int8", 2),
    Stored("int8, dense int8", "int8", 2, True),
    Stored("int4, dense float16", "int4", 2),
    Stored("int4, dense int8", "int4", 2, True),
)


def table_of_formats(sizes: ModelSizes, work: Workload) -> str:
    """As Markdown: how large the weights are, and what a decode step of so many sentences and an encoder's pass over
    one read of them; all in the same unit."""
    steps = [f"step, {sentences}" for sentences in SENTENCES] if sizes.decoder is not None else []
    passes = [f"encoder, {work.length} tokens"] if sizes.encoder is not None else []
    large = sizes.parameters * 4 >= _GIB
    unit, name = (_GIB, "GiB") if large else (_MIB, "MiB")
    head, rows = (f"weights, {name}", "an expert", "experts", "dense", "all", *steps, *passes), []
    for stored in STORED:
        if stored.experts != FLOAT and not sizes.experts:
            continue
        if sizes.quantized not in (None, (stored.experts, stored.int8_dense)):
            continue
        expert = sizes.expert_bytes(stored.experts, stored.element)
        experts = expert * sizes.all_experts
        dense = sizes.dense_bytes(stored.element, stored.int8_dense)
        counted = (expert, experts, dense, experts + dense, *_reads(sizes, work, stored, expert))
        rows.append((stored.name, *(f"{each / unit:.{3 if each is expert else 2}f}" for each in counted)))
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _reads(sizes: ModelSizes, work: Workload, stored: Stored, expert: int) -> list[float]:
    """Bytes of a decode step at each of SENTENCES, then of an encoder's pass over one sentence."""
    how = (sizes.choices, expert, stored.element, stored.int8_dense)
    found = [] if sizes.decoder is None else [sizes.decoder.bytes(each * work.beam, *how) for each in SENTENCES]
    return found + ([] if sizes.encoder is None else [sizes.encoder.bytes(work.length, *how)])


@dataclass(frozen=True)
class Choice:
    """What fits a memory best: its weights in words, and the setting; None where nothing fits."""

    weights: str
    setting: Setting | None


# from the least lossy on; the last one with a buffer where it does not fit whole
_PREFERRED = (("float", FLOAT, False), ("int8", "int8", True), ("int4", "int4", True))


def choose(sizes: ModelSizes, memory: int, on_gpu: bool, work: Workload) -> Choice:
    """For a GPU of `memory` bytes beside RAM for the rest, or for a CPU with so much RAM."""

    def settings(weights: str, int8_dense: bool) -> list[Setting]:
        device, host = (memory, None) if on_gpu else (0, memory)
        found = plan(sizes, device, host, work, weights, int8_dense)
        return [each for each in found if each.name.startswith("one GPU" if on_gpu else "CPU")]

    preferred = _PREFERRED if sizes.experts else _PREFERRED[:1]
    if sizes.quantized is not None:
        preferred = ((sizes.quantized[0], *sizes.quantized),)
    for name, weights, int8_dense in preferred:
        whole = settings(weights, int8_dense)[0]
        if whole.fits:
            return Choice(f"{name}, all of it", whole)
    name, weights, int8_dense = preferred[-1]
    for setting in settings(weights, int8_dense)[1:]:
        if setting.fits:
            layer = "encoder layer" if "--expert-buffer-scope encoder" in setting.flags else "layer"
            return Choice(f"{name}, {setting.places} of {sizes.experts} experts of each {layer}", setting)
    return Choice("", None)


def table_of_memories(sizes: ModelSizes, work: Workload, memories: Sequence[int] = MEMORIES) -> str:
    """As Markdown: for a CPU with so many GiB of RAM, and a GPU with so many GiB, what fits best and its flags."""
    head, rows = ("memory", "weights", "flags"), []
    for on_gpu, kind in ((False, "RAM, no GPU"), (True, "a GPU")):
        for memory in memories:
            found = choose(sizes, memory * _GIB, on_gpu, work)
            if found.setting is None:
                rows.append((f"{memory} GiB, {kind}", "too little for the dense part and one expert a layer", ""))
            else:
                flags = found.setting.flags
                rows.append((f"{memory} GiB, {kind}", found.weights, f"`{flags}`" if flags else ""))
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)
