"""Runs with --expert-buffer-size: time, misses, and bytes in slots, beside the run with every expert resident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY
from fairseq_moe_ext.buffering.simulation import layers_of, simulate
from fairseq_moe_ext.serving.memory_plan import read_sizes
from reproduction.models import Model
from reproduction.runs import Run, run
from reproduction.study import Study
from reproduction.tables import markdown

ELEMENT = 4  # bytes: served in float32


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
        # the scope says nothing without a buffer, but makes this run one of this series, measured beside the others
        flags = ["--expert-buffer-scope", "all"]
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


def served_table(rows: Sequence[ServedRow]) -> str:
    head = ("model", "batch", "buffer", "expert bytes in slots", "weights in memory", "misses", "simulated",
            "ms a batch", "over all resident", "waited for copies", "quality")
    whole, body = whole_rows(rows), []
    for row in rows:
        buffered = row.size is not None
        body.append((
            row.model, row.batch, f"{row.size} of {row.experts}" if buffered else "all resident",
            f"{row.slot_bytes / row.expert_bytes:.0%}", f"{row.model_bytes / whole[row.model].model_bytes:.0%}",
            f"{row.misses:,} of {row.accesses:,}" if buffered else None,
            f"{row.simulated_misses:,}" if buffered else None,
            f"{row.batch_ms:.1f}", f"{row.batch_ms / whole[row.model].batch_ms:.2f}",
            f"{row.copy_share:.0%}" if buffered else None, row.quality,
        ))
    intro = (
        "`--expert-buffer-size`, both stacks, `--expert-store disk`, the default order and policy "
        f"({DEFAULT_ORDER}, {DEFAULT_POLICY}); one thread. Two slots more than the buffer's are for experts on their "
        "way.\n\n"
    )
    return intro + markdown(head, body)
