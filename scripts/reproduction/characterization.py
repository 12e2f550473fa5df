"""Where time and memory go: dense, static and dynamic, per batch size, by part.

    bash scripts/reproduce_characterization.sh
    CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_characterization.sh --batches 8 32

results/characterization/ gets characterization.csv, characterization.md, characterization.png (latency by part) and
characterization-memory.png. Latency is of one pass (of the MT decoder of one decode step, translations of 16 tokens
with beam) on one process; the exchange is shown by a run of 2 processes over gloo. Dense is the same transformer with
one feed-forward where the experts are. Memory: the peak of a batch's tensors; the dispatch mask is what static gating
takes beyond static gating by indices (sparse static), which fills the same slots.
Source: "Toward Efficient Inference for Mixture of Experts", characterisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from reproduction.ladder import PAPER_KEYS, Ladder, one_of, waste_sentence
from reproduction.paper import beside_paper, paper_value
from reproduction.passes import DENSE, DYNAMIC, GATINGS, PARTS, SPARSE, STATIC, Pass
from reproduction.plots import BATCH, COLOURS, look, over_batches, panels, save
from reproduction.runs import Run, run
from reproduction.stacks import DECODER, LM
from reproduction.study import BATCHES, FRACTION, Option, Study, run_study
from reproduction.tables import Finding, findings_section, grouped, markdown, table, unique, write_csv

RANKS = 2
ALL_PARTS = (*PARTS, "rest")
SECTION = "section on the characterisation"


def parts_of(each: Pass) -> dict[str, float]:
    """Milliseconds by part, the rest too."""
    return {**each.parts, "rest": each.rest}


def mask_bytes(passes: Sequence[Pass], batch: int) -> int:
    """What the dense mask adds to the peak of a batch."""
    static, sparse = (one_of(passes, gating=gating, batch=batch) for gating in (STATIC, SPARSE))
    return max(0, static.peak_bytes - sparse.peak_bytes)


def latency_table(passes: Sequence[Pass]) -> str:
    head = ("stack", "batch", "tokens", "gating", "ms", "times dense", *ALL_PARTS)
    body = []
    for (_, stack), of_stack in grouped(passes, "model", "stack").items():
        for each in of_stack:
            dense = one_of(of_stack, gating=DENSE, batch=each.batch)
            parts = (f"{taken:.2f}" if taken else None for taken in parts_of(each).values())
            body.append((stack, each.batch, f"{each.tokens:,.0f}", each.gating, f"{each.milliseconds:.2f}",
                         f"{each.milliseconds / dense.milliseconds:.1f}", *parts))
    return markdown(head, body)


def memory_table(passes: Sequence[Pass]) -> str:
    """Per model, whose stacks share a batch's peak."""
    head = ("model", "batch", "gating", "parameters, MB", "activations, MB", "dispatch mask, MB", "all, MB")
    body = []
    for of_stack in _one_stack_per_model(passes):
        for each in of_stack:
            mask = mask_bytes(of_stack, each.batch) if each.gating == STATIC else 0
            sizes = (each.parameter_bytes, each.peak_bytes - mask, mask, each.parameter_bytes + each.peak_bytes)
            shown = (f"{size / 1e6:.1f}" for size in sizes)
            body.append((each.model.replace("_", " "), each.batch, each.gating, *shown))
    return markdown(head, body)


def _one_stack_per_model(passes: Sequence[Pass]) -> list[list[Pass]]:
    return [list(grouped(of_model, "stack").values())[0] for of_model in grouped(passes, "model").values()]


def exchange_rows(runs: dict[tuple[str, str], Run]) -> list[dict]:
    """Of runs by (model, gating) on several ranks: per stack the shares of the ranks' time."""
    rows = []
    for (model, gating), served in runs.items():
        for side in ("encoder", "decoder"):
            if side not in served.report:
                continue
            layers = [layer for layer in served.report["layers"] if layer["name"].startswith(side)]
            whole = served.report[side]["seconds"] * served.report["world_size"]
            shares = {
                part: sum(layer["seconds"].get(name, 0.0) for layer in layers for name in names) / whole
                for part, names in PARTS.items()
            }
            sent = sum(layer["bytes_exchanged"] for layer in layers) / max(1, served.report[side]["tokens"])
            stack = f"MT {side}" if "encoder" in served.report else LM
            rows.append({"model": model, "stack": stack, "gating": gating, **shares,
                         "rest": 1 - sum(shares.values()), "bytes_per_token": sent})
    return rows


def exchange_table(rows: Sequence[dict]) -> str:
    parts = ((part, f"{{[{part}]:.1%}}") for part in ALL_PARTS)
    sent = ("bytes sent per token", "{[bytes_per_token]:,.0f}")
    return table(rows, ("stack", "{[stack]}"), ("gating", "{[gating]}"), *parts, sent)


def beside(passes: Sequence[Pass], bases: dict[str, int]) -> list[tuple[str, str]]:
    """(key of the paper's figure, ours) at the paper's batch."""
    found = []
    for (model, stack), of_stack in grouped(passes, "model", "stack").items():
        dense, static = (one_of(of_stack, gating=gating, batch=bases[model]) for gating in (DENSE, STATIC))
        key = f"characterisation.{PAPER_KEYS[stack]}"
        found += [(f"{key}.{gating}-ms", f"{each.milliseconds:.1f} ms") for gating, each in
                  (("dense", dense), ("static", static))]
        found.append((f"{key}.slowdown", f"{static.milliseconds / dense.milliseconds:.1f}x"))
        if stack != DECODER:
            kind = PAPER_KEYS[stack].partition("-")[0]
            for gating, each in (("dense", dense), ("static", static)):
                size = each.parameter_bytes + each.peak_bytes
                found.append((f"characterisation.{kind}.{gating}-gb", f"{size / 1e9:.3f} GB"))
    return found


def findings(passes: Sequence[Pass], bases: dict[str, int]) -> list[Finding]:
    found = []
    for (model, stack), of_stack in grouped(passes, "model", "stack").items():
        dense, static, dynamic = (
            one_of(of_stack, gating=gating, batch=bases[model]) for gating in (DENSE, STATIC, DYNAMIC)
        )
        slowdown = paper_value(f"characterisation.{PAPER_KEYS[stack]}.slowdown")
        ratio = static.milliseconds / dense.milliseconds
        found.append(Finding(
            f"static gating makes the {stack} several times slower than the dense model, {slowdown} times there",
            SECTION,
            "at least 2 times, at the paper's batch",
            f"{ratio:.1f} times, {dynamic.milliseconds / dense.milliseconds:.1f} under dynamic gating ({model}, batch "
            f"{bases[model]})",
            ratio >= 2,
        ))
        parts = parts_of(static)
        largest = max(parts, key=parts.get)
        found.append(Finding(
            f"padding, not the chosen experts, is what static gating spends its time on ({stack})",
            "follows from its waste factor, section on static gating",
            "static gating's dispatch, experts and combine take at least twice what dynamic gating's do",
            f"{_padded(static):.1f} ms against {_padded(dynamic):.1f}; of static gating's parts `{largest}` is the "
            f"largest with {parts[largest] / static.milliseconds:.0%}",
            _padded(static) >= 2 * _padded(dynamic),
        ))
    for of_stack in _one_stack_per_model(passes):
        model = of_stack[0].model
        static = one_of(of_stack, gating=STATIC, batch=bases[model])
        mask = mask_bytes(of_stack, bases[model])
        found.append(Finding(
            f"the dispatch mask is most of static gating's activations ({model.replace('_', ' ')})",
            "follows from its size, section on static gating",
            "more than half of their peak, at the paper's batch",
            f"{mask / static.peak_bytes:.0%} of {static.peak_bytes / 1e6:.1f} MB",
            mask > static.peak_bytes / 2,
        ))
    return found


def _padded(each: Pass) -> float:
    """Milliseconds of the parts that slots make longer."""
    return sum(each.parts[part] for part in ("dispatch", "experts", "combine"))


def draw_latency(file, passes: Sequence[Pass], bases: dict[str, int]) -> None:
    """Per stack: bars by part at the paper's batch, and lines over the batches."""
    stacks = grouped(passes, "model", "stack")
    figure, axes = panels(2, len(stacks), width=4.4, height=3.6)
    for (bars, lines), ((model, stack), of_stack) in zip(axes.T, stacks.items(), strict=True):
        at_base = [one_of(of_stack, gating=gating, batch=bases[model]) for gating in GATINGS]
        bottom = [0.0] * len(at_base)
        for colour, part in zip(COLOURS, ALL_PARTS, strict=False):
            heights = [parts_of(each)[part] for each in at_base]
            if any(heights):
                bars.bar([each.gating for each in at_base], heights, bottom=bottom, color=colour, label=part)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        bars.set(title=f"{stack}, batch {bases[model]}", ylabel="ms a pass")
        bars.tick_params(axis="x", labelsize=8)
        bars.legend(fontsize=8)
        for number, gating in enumerate(GATINGS):
            points = [(each.batch, each.milliseconds) for each in of_stack if each.gating == gating]
            lines.plot(*zip(*points, strict=True), label=gating, **look(number))
        over_batches(lines, unique(of_stack, "batch"), ylabel="ms a pass")
    save(figure, file)


def draw_memory(file, passes: Sequence[Pass]) -> None:
    """Per model: stacked bars of parameters, activations and mask, gating by gating and batch by batch."""
    models = _one_stack_per_model(passes)
    figure, axes = panels(1, len(models), width=6.0, height=4.2)
    for panel, of_stack in zip(axes[0], models, strict=True):
        batches = sorted({each.batch for each in of_stack})
        for number, gating in enumerate(GATINGS):
            places = [index + 0.2 * (number - 1.5) for index in range(len(batches))]
            each = [one_of(of_stack, gating=gating, batch=batch) for batch in batches]
            mask = [mask_bytes(of_stack, batch) / 1e6 if gating == STATIC else 0.0 for batch in batches]
            parameters = [one.parameter_bytes / 1e6 for one in each]
            activations = [one.peak_bytes / 1e6 - hidden for one, hidden in zip(each, mask, strict=True)]
            below = [one + other for one, other in zip(parameters, activations, strict=True)]
            how = {"width": 0.18, "edgecolor": "white", "linewidth": 0.4}
            first = gating == STATIC
            panel.bar(places, parameters, color=COLOURS[5], label="parameters" if first else None, **how)
            panel.bar(places, activations, bottom=parameters, color=COLOURS[0],
                      label="activations" if first else None, **how)
            panel.bar(places, mask, bottom=below, color=COLOURS[1], label="dispatch mask" if first else None, **how)
            panel.annotate(gating, (places[-1], sum(column[-1] for column in (parameters, activations, mask))),
                           rotation=90, ha="center", va="bottom", fontsize=8, xytext=(0, 3), textcoords="offset points")
        title = of_stack[0].model.replace("_", " ")
        panel.set(title=title, xlabel=BATCH, ylabel="MB at the peak")
        panel.set_xticks(range(len(batches)), labels=map(str, batches))
        panel.margins(y=0.2)
        panel.legend(fontsize=8, loc="upper left")
    save(figure, file)


def make(study: Study) -> str:
    ladders = {model.name: Ladder(study, model) for model in study.models}
    batches = {name: study.args.batches or ladder.small for name, ladder in ladders.items()}
    passes, runs = [], {}
    steps = sum(map(len, batches.values())) + 2 * len(study.models) * study.args.exchange
    with tqdm(total=steps, unit="batch") as bar:
        for name, ladder in ladders.items():
            for rows in batches[name]:
                bar.set_description(f"{name}, batch {rows}")
                passes += ladder.measure(rows, GATINGS)
                bar.update()
        for model in study.models if study.args.exchange else ():
            for gating in (STATIC, DYNAMIC):
                bar.set_description(f"{model.name}, {RANKS} ranks, {gating}")
                flags = ("--moe-gating", gating, "--moe-eval-capacity-token-fraction", study.args.capacity_fraction)
                runs[model.name, gating] = run(
                    study.runs, model, study.args.subset, flags=flags, rows=model.few_rows, ranks=RANKS
                )
                bar.update()
    bases = {
        name: ladder.base if ladder.base in batches[name] else max(batches[name]) for name, ladder in ladders.items()
    }
    write_csv(study.file(".csv"), [
        {"model": each.model, "stack": each.stack, "gating": each.gating, "batch": each.batch, "tokens": each.tokens,
         "milliseconds": each.milliseconds, **parts_of(each), "peak_bytes": each.peak_bytes,
         "parameter_bytes": each.parameter_bytes}
        for each in passes
    ])
    draw_latency(study.file(".png"), passes, bases)
    draw_memory(study.file("-memory.png"), passes)
    parts = [
        "# Characterization",
        f"Milliseconds of a pass (MT decoder: of a decode step), medians, one thread; static gating at a capacity "
        f"fraction of {study.args.capacity_fraction:g}. A batch is sentences (MT, beams multiply the decoder's rows) "
        "or blocks (LM). `rest` is everything outside the MoE layers; `gate` has the counting of slots in it.",
        latency_table(passes),
        "## Memory",
        "The peak of a batch's tensors. The dispatch mask is static gating's peak less that of the same slots found by "
        "indices.",
        memory_table(passes),
    ]
    if runs:
        few = ", ".join(f"{model.few_rows} ({model.title})" for model in study.models)
        parts += [
            f"## {RANKS} ranks",
            f"Shares of the ranks' time, {RANKS} processes over gloo on this machine, batches of {few}; `exchange` is "
            "waiting for sizes, and for tokens on both ways.",
            exchange_table(exchange_rows(runs)),
        ]
    parts += ["## Beside the paper", beside_paper(beside(passes, bases)), waste_sentence(passes)]
    parts.append(findings_section(findings(passes, bases)))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    exchange = Option("exchange", f"leave the runs of {RANKS} processes out", kind=bool)
    return run_study("characterization", __doc__, make, arguments, [FRACTION, BATCHES, exchange])
