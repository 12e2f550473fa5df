"""The pictures of the expert buffer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fairseq_moe_ext.buffering.eviction import ORDERS
from fairseq_moe_ext.buffering.simulation import MIN
from reproduction.buffer_served import ServedRow, whole_rows
from reproduction.buffer_simulated import PAPERS_ORDER, PLACEMENTS, RULES, SimulatedRow
from reproduction.plots import COLOURS, MARKERS, panels, save

LOOKS = {rule: {"color": COLOURS[number], "marker": MARKERS[number]} for number, rule in enumerate(RULES)}
LOOKS[MIN] = {"color": "black", "marker": "", "linestyle": "--"}
NAMES = {rule: rule.upper() for rule in RULES}


def draw_misses(file: Path, rows: Sequence[SimulatedRow]) -> None:
    """Miss rate against size; a column per stack, a row per order of computation."""
    stacks = list(dict.fromkeys(row.stack for row in rows))
    figure, axes = panels(len(ORDERS), len(stacks), width=4.4, height=3.4, sharey=True, sharex="col")
    for of_order, order in zip(axes, reversed(ORDERS), strict=True):
        for panel, stack in zip(of_order, stacks, strict=True):
            for policy in RULES:
                curve = [row for row in rows if (row.stack, row.order, row.policy) == (stack, order, policy)]
                xs, ys = [row.size for row in curve], [100 * row.miss_rate for row in curve]
                panel.plot(xs, ys, label=NAMES[policy], markersize=4, **LOOKS[policy])
            panel.set_title(f"{stack}, batches of {curve[0].batch}, {order}", fontsize=10)
        of_order[0].set_ylabel("% of accesses that miss")
    for panel in axes[-1]:
        panel.set_xlabel("experts in the buffer")
    axes[0][0].legend(fontsize=8)
    save(figure, file)


def draw_ranks(file: Path, rows: Sequence[SimulatedRow]) -> None:
    """Misses against size per rank in the paper's order: contiguous filled, balanced hollow."""
    stacks = list(dict.fromkeys(row.stack for row in rows))
    figure, (row_of_panels,) = panels(1, len(stacks), width=4.6, height=4.0)
    for panel, stack in zip(row_of_panels, stacks, strict=True):
        for policy in ("lifo", "fifo", MIN):
            for placement in PLACEMENTS:
                curve = [row for row in rows if (row.stack, row.order, row.policy, row.placement)
                         == (stack, PAPERS_ORDER, policy, placement)]
                balanced = placement == PLACEMENTS[1]
                looks = {"color": LOOKS[policy]["color"], "marker": LOOKS[policy]["marker"] or "x",
                         "linestyle": "--" if balanced else "-", "markerfacecolor": "white" if balanced else None}
                xs, ys = [row.size for row in curve], [row.misses for row in curve]
                panel.plot(xs, ys, label=f"{NAMES[policy]}, {placement}", markersize=5, **looks)
        panel.set(title=f"{stack}, {curve[0].ranks} ranks", xlabel="experts in each rank's buffer", ylim=(0, None))
    row_of_panels[0].set_ylabel("misses of all ranks")
    row_of_panels[0].legend(fontsize=8)
    save(figure, file)


def draw_served(file: Path, rows: Sequence[ServedRow]) -> None:
    """Time of a batch, and weights in memory, against the buffer's size, both over all experts resident."""
    figure, (row_of_panels,) = panels(1, 2, width=5.2, height=4.0)
    for number, (model, whole) in enumerate(whole_rows(rows).items()):
        of_model = sorted((row for row in rows if row.model == model), key=lambda row: row.size or row.experts)
        sizes = [100 * (row.size or row.experts) / row.experts for row in of_model]
        looks = {"color": COLOURS[number], "marker": MARKERS[number], "label": f"{model}, batches of {whole.batch}"}
        row_of_panels[0].plot(sizes, [row.batch_ms / whole.batch_ms for row in of_model], **looks)
        row_of_panels[1].plot(sizes, [100 * row.model_bytes / whole.model_bytes for row in of_model], **looks)
    row_of_panels[0].set(ylabel="time of a batch / all resident", ylim=(0, None))
    row_of_panels[1].set(ylabel="weights in memory, % of all resident", ylim=(0, 104))
    for panel in row_of_panels:
        panel.set_xlabel("% of a layer's experts in the buffer (100: resident)")
        panel.legend(fontsize=8, loc="lower right")
    save(figure, file)
