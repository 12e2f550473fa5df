"""An expert buffer's rows: simulated on a recorded routing, by size, order, policy and placement; and served.

Legend: R = ranks, E = experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from tqdm import tqdm

from fairseq_moe_ext.balancing.fit import phases_of_layers
from fairseq_moe_ext.balancing.load import layer_load
from fairseq_moe_ext.balancing.placement import contiguous
from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY, ORDERS, POLICIES
from fairseq_moe_ext.buffering.rounds import loads_of_ranks
from fairseq_moe_ext.buffering.simulation import MIN, LayerLoads, layers_of, simulate
from fairseq_moe_ext.serving.memory_plan import read_sizes
from fairseq_moe_ext.trace import PhaseTrace, halve_trace
from reproduction.models import Model
from reproduction.runs import Run, run
from reproduction.stacks import Stack, balanced, stacks_of
from reproduction.study import Study

PAPERS_ORDER = "ascending"
PLACEMENTS = ("contiguous", "balanced")
RULES = (*POLICIES, MIN)
ELEMENT = 4  # bytes: served in float32


@dataclass(frozen=True)
class SimulatedRow:
    """A stack's buffers of one size: all layers' and ranks' accesses and misses together.

    size: experts per layer and rank, of `experts` that a rank holds. placement: `contiguous` where ranks is 1.
    worst_misses: of the rank that misses most.
    """

    model: str
    stack: str
    kind: str
    batch: int
    ranks: int
    placement: str
    experts: int
    size: int
    order: str
    policy: str
    accesses: int
    misses: int
    worst_misses: int

    @property
    def miss_rate(self) -> float:
        return self.misses / self.accesses if self.accesses else 0.0


def sizes_of(experts: int) -> list[int]:
    """1, a sixteenth of the experts, and every eighth up to all of them.

    >>> sizes_of(8)
    [1, 2, 3, 4, 5, 6, 7, 8]
    >>> sizes_of(32)
    [1, 2, 4, 8, 12, 16, 20, 24, 28, 32]
    """
    return sorted({1, max(1, experts // 16), *(-(-experts * eighth // 8) for eighth in range(1, 9))})


def simulate_one_rank(model: Model, trace: Mapping[str, PhaseTrace], batch: int, ranks: int) -> list[dict]:
    """The whole trace through one rank's buffers, as dicts of `SimulatedRow`; `ranks` is not needed."""
    layers = {layer.name: layer for layer in layers_of(trace)}
    rows = []
    for stack in stacks_of(model, trace):
        base = _base(model, stack, batch, 1, PLACEMENTS[0], stack.num_experts)
        rows += _rows(base, {0: [layers[name] for name in stack.steps]}, sizes_of(stack.num_experts))
    return rows


def simulate_ranks(model: Model, trace: Mapping[str, PhaseTrace], batch: int, ranks: int) -> list[dict]:
    """The trace's second half through the buffers of R ranks, under both placements; balanced is fitted on the first.

    Balanced is the paper's: greedy, for the MT decoder anti-correlation. Nothing where ranks outnumber experts.
    """
    stacks = stacks_of(model, trace)
    if min(stack.num_experts for stack in stacks) < ranks:
        return []
    first, second = halve_trace(dict(trace))
    start = min(int(part.batch.min()) for part in second.values())
    second = {phase: replace(part, batch=part.batch - start) for phase, part in second.items()}
    phases = phases_of_layers(dict(trace))
    kinds = {name: stack.kind for stack in stacks for name in stack.steps}
    experts = {name: trace[phase].load.shape[2] for name, phase in phases.items()}
    even = {name: contiguous(experts[name], ranks) for name in phases}
    fitted = {name: balanced(layer_load(first[phase], name), ranks, kinds[name]) for name, phase in phases.items()}
    rows = []
    for placement, places in zip(PLACEMENTS, (even, fitted), strict=True):
        seen = loads_of_ranks(second, places, ranks)
        for stack in stacks:
            held = max(sum(rank in at for at in places[name]) for name in stack.steps for rank in range(ranks))
            of_ranks = {rank: [layer for layer in layers if layer.name in stack.steps] for rank, layers in seen.items()}
            rows += _rows(_base(model, stack, batch, ranks, placement, held), of_ranks, sizes_of(held))
    return rows


def _base(model: Model, stack: Stack, batch: int, ranks: int, placement: str, experts: int) -> dict:
    return {"model": model.name, "stack": stack.title, "kind": stack.kind, "batch": batch, "ranks": ranks,
            "placement": placement, "experts": experts}


def _rows(base: dict, of_ranks: Mapping[int, Sequence[LayerLoads]], sizes: Iterable[int]) -> list[dict]:
    rows = []
    for size in sizes:
        for order in ORDERS:
            for policy in RULES:
                found = {rank: [simulate(layer, min(size, layer.num_experts), order, policy) for layer in layers]
                         for rank, layers in of_ranks.items()}
                misses = [sum(each.misses for each in outcomes) for outcomes in found.values()]
                accesses = sum(each.accesses for outcomes in found.values() for each in outcomes)
                rows.append(asdict(SimulatedRow(
                    **base, size=size, order=order, policy=policy, accesses=accesses, misses=sum(misses),
                    worst_misses=max(misses),
                )))
    return rows


@dataclass(frozen=True)
class ServedRow:
    """A served run; size None: every expert resident. Bytes and misses of all layers together.

    simulated_misses: what the recorded routing says, 0 where size is None. model_bytes: of all weights, experts in
    their slots. batch_ms: the model's passes of a batch, mean. copy_share: of that, waited for copies.
    """

    model: str
    batch: int
    experts: int
    size: int | None
    misses: int
    accesses: int
    simulated_misses: int
    slot_bytes: int
    expert_bytes: int
    model_bytes: int
    batch_ms: float
    copy_share: float
    quality: str


def serve_sizes(study: Study, model: Model, batch: int, shares: Sequence[float], bar: tqdm) -> list[ServedRow]:
    """Every expert resident, then buffers of these shares of a layer's experts, in the default order and policy."""
    dense, rows = read_sizes(str(model.checkpoint)).dense * ELEMENT, []
    experts = layers_of(run(study.runs, model, study.args.subset, rows=batch).trace)[0].num_experts
    for size in (None, *dict.fromkeys(max(1, round(share * experts)) for share in shares)):
        bar.set_description(f"{model.name}, {'all' if size is None else size} experts resident")
        # the default, written, makes this run one of this series, measured beside the others
        flags = ["--moe-kernel", "auto"]
        if size is not None:
            flags += ["--expert-buffer-size", size, "--expert-store", "disk"]
        found = run(study.runs, model, study.args.subset, flags, batch)
        rows.append(_row(model, batch, size, found, dense))
        bar.update()
    return rows


def _row(model: Model, batch: int, size: int | None, found: Run, dense: int) -> ServedRow:
    report, layers = found.report, layers_of(found.trace)
    simulated = 0
    if size is not None:
        simulated = sum(simulate(layer, size, DEFAULT_ORDER, DEFAULT_POLICY).misses for layer in layers)
    seconds = sum(report.get(side, {}).get("seconds", 0.0) for side in ("encoder", "decoder"))
    copies = sum(layer["seconds"].get("copy", 0.0) for layer in report["layers"])
    batches = 1 + max(int(part.batch.max()) for part in found.trace.values())
    misses = sum(layer["misses"] for layer in report["layers"])
    memory = report["memory"]
    return ServedRow(
        model=model.title,
        batch=batch,
        experts=layers[0].num_experts,
        size=size,
        misses=misses,
        accesses=misses + sum(layer["hits"] for layer in report["layers"]),
        simulated_misses=simulated,
        slot_bytes=memory["expert_bytes_resident"],
        expert_bytes=memory["expert_bytes_total"],
        model_bytes=dense + memory["expert_bytes_resident"],
        batch_ms=1000 * seconds / batches,
        copy_share=copies / seconds if seconds else 0.0,
        quality=", ".join(f"{name} {value:.2f}" for name, value in found.quality.items()),
    )


def whole_rows(rows: Sequence[ServedRow]) -> dict[str, ServedRow]:
    """Per model the run with every expert resident."""
    return {row.model: row for row in rows if row.size is None}
