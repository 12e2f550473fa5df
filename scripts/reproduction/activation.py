"""Which experts are active: each one's share per batch, how many idle, and how much of that stays from batch to batch.

    bash scripts/reproduce_activation.sh
    CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_activation.sh --batches 8 32

results/activation/ gets activation.csv (per stack and batch size), activation.md, activation.png (shares of the experts
in every batch), activation-idle.png and activation-locality.png. Batches are sentences, of a language model blocks of
tokens. What a decoder does is counted per decode step, where every live beam is a token.
Source: "Toward Efficient Inference for Mixture of Experts", section on expert activation.

Legend: S = steps, E = experts, H = hottest experts of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from fairseq_moe_ext.balancing.load import expert_sparsity, shares, temporal_locality
from reproduction.paper import paper_value
from reproduction.plots import BATCH, HEAT, look, panels, save
from reproduction.runs import run
from reproduction.stacks import DECODER, ENCODER, LM, Stack, stacks_of
from reproduction.study import BATCHES, Study, run_study
from reproduction.tables import Finding, findings_section, grouped, table, write_csv

LM_BATCHES, MT_BATCHES = (1, 2, 4, 8, 16), (4, 8, 16, 48, 96)
HOT_SHARE = 8  # one expert in so many counts as hot


@dataclass(frozen=True)
class Row:
    """One stack at one batch size; means over steps and layers. Shares are of the experts, from 0 to 1.

    idle_even: what even routing of as many assignments would leave idle. hottest: the hottest expert's load over the
    mean one. active_stays: of a step's active experts, those active the step before; active_any: those active in any
    other step; hot_stays and hot_any: the same of the E / 8 hottest; hot_batches and hot_batches_any: of those of whole
    batches, a decoder's steps added up. hot_chance: were each step's hottest drawn by lot.
    """

    model: str
    stack: str
    kind: str
    experts: int
    batch: int
    steps: int
    assignments_per_expert: float
    idle: float
    idle_even: float
    hottest: float
    active_stays: float
    active_any: float
    hot_stays: float
    hot_any: float
    hot_batches: float
    hot_batches_any: float
    hot_chance: float


def measure(stack: Stack, batch: int) -> Row:
    layers, experts = stack.loads(per_step=True), stack.num_experts

    def mean(figure, per_step: bool = True) -> float:
        return float(np.mean([figure(loads) for loads in stack.loads(per_step)]))

    return Row(
        model=stack.model,
        stack=stack.title,
        kind=stack.kind,
        experts=experts,
        batch=batch,
        steps=len(layers[0]),
        assignments_per_expert=mean(np.mean),
        idle=mean(expert_sparsity),
        idle_even=mean(lambda loads: np.mean((1 - 1 / experts) ** loads.sum(axis=1))),
        hottest=mean(lambda loads: shares(loads).mean(axis=0).max() * experts),
        active_stays=mean(temporal_locality),
        active_any=mean(lambda loads: overlap_of_any_two(loads > 0)),
        hot_stays=mean(lambda loads: temporal_locality(hottest(loads))),
        hot_any=mean(lambda loads: overlap_of_any_two(hottest(loads))),
        hot_batches=mean(lambda loads: temporal_locality(hottest(loads)), per_step=False),
        hot_batches_any=mean(lambda loads: overlap_of_any_two(hottest(loads)), per_step=False),
        hot_chance=hot_count(experts) / experts,
    )


def hot_count(experts: int) -> int:
    return max(1, experts // HOT_SHARE)


def hottest(loads: np.ndarray) -> np.ndarray:
    """(S, E) bool: each step's H experts with the largest loads (S, E), ties by number; none in a step without load."""
    order = np.argsort(-loads, axis=1, kind="stable")[:, : hot_count(loads.shape[1])]
    hot = np.zeros(loads.shape, dtype=bool)
    np.put_along_axis(hot, order, True, axis=1)
    return hot & loads.any(axis=1, keepdims=True)


def overlap_of_any_two(sets: np.ndarray) -> float:
    """How much of a step's set (S, E) bool is in that of any other step, whichever; nan of fewer than two steps."""
    steps, often = len(sets), sets.sum(axis=0, dtype=np.int64)
    if steps < 2 or not often.any():
        return float("nan")
    return float((often * (often - 1)).sum() / (often.sum() * (steps - 1)))


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The paper's, held against the stacks of the kind that it names."""
    found = []
    for kind, batch in ((LM, "characterisation.lm.batch"), (ENCODER, "characterisation.mt.batch")):
        for row in _at_batch(rows, kind, paper_value(batch)):
            found.append(Finding(
                f"in the {kind} nearly all experts are active",
                "section on expert activation",
                "at most a tenth idle at the paper's batch, or the largest one below it",
                f"{row.idle:.1%} of {row.experts} idle at batch {row.batch} ({row.stack})",
                row.idle <= 0.1,
            ))
            found.append(Finding(
                f"in the {kind} some experts are hot",
                "section on expert activation",
                "the hottest has at least twice the mean load",
                f"{row.hottest:.1f} times ({row.stack}, batch {row.batch})",
                row.hottest >= 2,
            ))
    idle, batch = (paper_value(f"activation.mt-decoder.{name}") for name in ("idle", "batch"))
    for row in _at_batch(rows, DECODER, batch):
        found.append(Finding(
            f"in the MT decoder about {idle:.0%} of the experts idle even at batch {batch}",
            "section on expert activation",
            "more than half idle at that batch",
            f"{row.idle:.1%} of {row.experts} idle at batch {row.batch}, {row.assignments_per_expert:.1f} assignments "
            f"an expert, where even routing would leave {row.idle_even:.1%} idle ({row.stack})",
            row.idle > 0.5,
        ))
    encoder, decoder = "characterisation.mt.batch", "activation.mt-decoder.batch"
    for kind, batch in ((LM, "characterisation.lm.batch"), (ENCODER, encoder), (DECODER, decoder)):
        for row in _at_batch(rows, kind, paper_value(batch)):
            near = row.hot_batches > row.hot_batches_any + 0.05
            found.append(Finding(
                f"hot experts persist over consecutive batches ({kind})",
                "section on expert activation, temporal locality",
                "of a batch's hottest eighth at least twice as many were in the hottest eighth of the batch before as "
                "by lot, at the paper's batch",
                f"{row.hot_batches:.0%}, by lot {row.hot_chance:.0%}; in any other batch's {row.hot_batches_any:.0%}, "
                f"so that {'nearness in time' if near else 'popularity at all times'} is behind it ({row.stack}, batch "
                f"{row.batch})",
                row.hot_batches >= 2 * row.hot_chance,
            ))
    return found


def _at_batch(rows: Sequence[Row], kind: str, batch: int) -> list[Row]:
    """Per stack of that kind the row at `batch`, or at the largest below it, or else the smallest."""
    found = []
    for of_stack in grouped([row for row in rows if row.kind == kind], "stack").values():
        of_stack = sorted(of_stack, key=lambda row: row.batch)
        found.append([row for row in of_stack if row.batch <= batch or row is of_stack[0]][-1])
    return found


def activation_table(rows: Sequence[Row]) -> str:
    stays = (("active stay", "active_stays"), ("in any other", "active_any"), ("hot stay", "hot_stays"),
             ("in any other", "hot_any"), ("hot stay, batches", "hot_batches"), ("in any other", "hot_batches_any"))
    return table(
        rows, ("stack", "{.stack}"), ("batch", "{.batch}"), ("steps", "{.steps}"),
        ("assignments an expert", "{.assignments_per_expert:.1f}"), ("idle", "{.idle:.1%}"),
        ("idle if even", "{.idle_even:.1%}"), ("hottest / mean", "{.hottest:.1f}"),
        *((head, f"{{.{name}:.0%}}") for head, name in stays),
    )


def draw_shares(file, stacks: Sequence[tuple[Stack, int]]) -> None:
    """Heat maps (experts, batches) of each expert's share; of a stack's layers the first and the last."""
    shown = [
        (stack, batch, name)
        for stack, batch in stacks
        for name in dict.fromkeys((list(stack.batches)[0], list(stack.batches)[-1]))
    ]
    columns = min(2, len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, width=6.2, height=3.6)
    for panel, (stack, batch, name) in zip(axes.flat, shown, strict=False):
        percent = 100 * shares(stack.batches[name]).T
        panel.grid(False)
        image = panel.imshow(percent, aspect="auto", interpolation="nearest", cmap=HEAT, vmin=0)
        number = name.split(".")[2] if name.count(".") > 2 else name
        panel.set(title=f"{stack.title}, layer {number}, batches of {batch}", xlabel="batch", ylabel="expert")
        figure.colorbar(image, ax=panel, label="% of the batch's assignments")
    for panel in axes.flat[len(shown):]:
        panel.set_visible(False)
    save(figure, file)


def draw_idle(file, rows: Sequence[Row]) -> None:
    figure, ((against_batch, against_work),) = panels(1, 2, width=5.6, height=4.2, sharey=True)
    for number, (name, of_stack) in enumerate(grouped(rows, "stack").items()):
        how = look(number)
        idle = [100 * row.idle for row in of_stack]
        against_batch.plot([row.batch for row in of_stack], idle, label=name, **how)
        work = [row.assignments_per_expert for row in of_stack]
        against_work.plot(work, idle, label=name, **how)
        even = [100 * row.idle_even for row in of_stack]
        against_work.plot(work, even, color=how["color"], linestyle=":", label=f"{name}, if routing were even")
    batch, idle = paper_value("activation.mt-decoder.batch"), 100 * paper_value("activation.mt-decoder.idle")
    against_batch.plot(batch, idle, "k*", markersize=13, label="paper's MT decoder, 128 experts")
    against_work.plot(batch * 2 / paper_value("mt.experts"), idle, "k*", markersize=13,
                      label="paper's MT decoder, one beam")
    against_batch.set(xlabel=BATCH, ylabel="% of the experts idle in a step", ylim=(-3, 100))
    against_work.set(xlabel="assignments an expert in a step", xscale="log")
    for panel in (against_batch, against_work):
        panel.legend(fontsize=8)
    save(figure, file)


def draw_locality(file, rows: Sequence[Row]) -> None:
    figure, (row_of_panels,) = panels(1, 3, width=4.4, height=4.0, sharey=True)
    kinds = (("active_stays", "active_any", "active experts, step to step"),
             ("hot_stays", "hot_any", "hottest eighth, step to step"),
             ("hot_batches", "hot_batches_any", "hottest eighth, batch to batch"))
    for panel, (stays, any_other, title) in zip(row_of_panels, kinds, strict=True):
        for number, (name, of_stack) in enumerate(grouped(rows, "stack").items()):
            how = look(number)
            batches = [row.batch for row in of_stack]
            of_before, of_any = ([100 * getattr(row, which) for row in of_stack] for which in (stays, any_other))
            panel.plot(batches, of_before, label=name, **how)
            panel.plot(batches, of_any, color=how["color"], linestyle=":")
        panel.set(title=title, xlabel=BATCH, xscale="log", ylim=(0, 104))
    row_of_panels[0].set_ylabel("% that stay from the one before\n(dotted: in any other)")
    row_of_panels[0].legend(fontsize=8, loc="lower right")
    save(figure, file)


def make(study: Study) -> str:
    wanted = [
        (model, batch)
        for model in study.models
        for batch in study.args.batches or (MT_BATCHES if model.translates else LM_BATCHES)
    ]
    rows, shown = [], {}
    for model, batch in (bar := tqdm(wanted, unit="run")):
        bar.set_description(f"{model.name}, batch {batch}")
        for stack in stacks_of(model, run(study.runs, model, study.args.subset, rows=batch).trace):
            rows.append(measure(stack, batch))
            if batch <= model.few_rows or stack.title not in shown:
                shown[stack.title] = (stack, batch)
    rows.sort(key=lambda row: (row.kind != LM, row.stack.endswith(DECODER), row.stack, row.batch))
    write_csv(study.file(".csv"), rows)
    draw_shares(study.file(".png"), list(shown.values()))
    draw_idle(study.file("-idle.png"), rows)
    draw_locality(study.file("-locality.png"), rows)
    parts = [
        "# Expert activation",
        "Steps are passes; of the MT decoder decode steps, in which every live beam is a token. Idle: without a token "
        "in a step. Idle if even: were as many assignments spread evenly at random. Hottest / mean: the hottest "
        "expert's load over the mean one. Stay: of a step's active experts (of its hottest eighth), those that were "
        "active (in the hottest eighth) in the step before, or in any other step; the last two columns: of whole "
        "batches, a decoder's steps added up.",
        activation_table(rows),
        findings_section(findings(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    batches = replace(BATCHES, help="batch sizes (4 to 96; LM: 1 to 16)")
    return run_study("activation", __doc__, make, arguments, [batches])
