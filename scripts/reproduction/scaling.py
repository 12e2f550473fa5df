"""A step of the published models on 8 to 256 ranks: modelled on recorded routing, measured costs and given bandwidths.

    bash scripts/reproduce_scaling.sh
    bash scripts/reproduce_scaling.sh --nvlink 300 --pcie 32 --network 25      # one more system, in GB/s

The routing is what CHECKPOINT chose on DATA, stretched to the published numbers of experts; docs/scaling_model.md says
what else is assumed. results/scaling/ gets scaling.csv, scaling.md and scaling.png; scaling-validation.csv and .png are
the same model beside real ranks over gloo on this machine.
Source of what is compared: "Toward Efficient Inference for Mixture of Experts", sections on throughput and balancing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from reproduction.cluster import Device, System, systems
from reproduction.layer_costs import LayerCosts, measure_costs, measure_device
from reproduction.models import arguments_of
from reproduction.paper import beside_paper, paper_value
from reproduction.plots import look, panels, save
from reproduction.runs import identity_of, remembered, run
from reproduction.scaling_validation import ValidationRow, draw_validation, validate, validation_section
from reproduction.stacks import stacks_of
from reproduction.step_model import SHAPES, ScalingRow, scale_stack
from reproduction.study import Option, Study, run_study
from reproduction.tables import Finding, findings_section, grouped, markdown, unique, write_csv

LINKS = {
    "nvlink": "of a GPU to those of its node",
    "pcie": "of a GPU to the node's ports",
    "network": "of a node to the others",
}
OPTIONS = (
    Option("ranks", "8 16 32 64 128 256", [8, 16, 32, 64, 128, 256], many=True, metavar="R", least=1),
    *(
        Option(name, f"bandwidth {what}, one direction", None, float, metavar="GB/s", above=0, unit=" GB/s")
        for name, what in LINKS.items()
    ),
)
CURVES = (("static", "contiguous"), ("dynamic", "contiguous"), ("dynamic", "balanced"))
KEYS = {"LM": "lm", "MT encoder": "mt-encoder", "MT decoder": "mt-decoder"}
PAPERS_NODES = (1, 2, 4)

At = dict[tuple[str, str, int, str, str], ScalingRow]


def wanted_systems(study: Study, here: Device) -> dict[str, System]:
    """The paper's, today's, this machine's threads on the paper's network, and the one that the options describe."""
    found = dict(systems())
    paper, today = found["paper"], found["today"]
    found["threads"] = System("one thread of this machine a rank, 100 Gb/s a node", here, paper.network, ())
    given = {name: getattr(study.args, name) for name in LINKS}
    given = {name: value * 1e9 for name, value in given.items() if value is not None}
    if given:
        names = ", ".join(f"{name} {value / 1e9:g} GB/s" for name, value in given.items())
        found["given"] = System(f"today's with {names}", today.device, replace(today.network, **given), ())
    return found


def _device_and_costs(study: Study) -> tuple[Device, dict[str, LayerCosts]]:
    """This machine's thread, and the costs of a layer of each published shape on it, measured once."""

    def measure() -> dict:
        device = measure_device()
        costs = {name: asdict(measure_costs(device, shape)) for name, shape in SHAPES.items()}
        return {"device": asdict(device), "costs": costs}

    shapes = {name: asdict(shape) for name, shape in SHAPES.items()}
    found = remembered(study.output / "costs.json", {"shapes": shapes}, measure)
    device = Device(**found["device"])
    costs = {
        name: LayerCosts(**{**each, "device": device, "rows": tuple(each["rows"]),
                            "expert_seconds": tuple(each["expert_seconds"])})
        for name, each in found["costs"].items()
    }
    return device, costs


def _index(rows: Sequence[ScalingRow]) -> At:
    return {(row.stack, row.system, row.ranks, row.gating, row.placement): row for row in rows}


def speedup(at: At, stack: str, system: str, ranks: int, over=CURVES[0], of=CURVES[1]) -> float:
    return at[stack, system, ranks, *over].step_ms / at[stack, system, ranks, *of].step_ms


def scaling_table(rows: Sequence[ScalingRow], systems: Mapping[str, System]) -> str:
    at, parts = _index(rows), []
    for system, described in systems.items():
        body = []
        for row in rows:
            if (row.system, row.gating, row.placement) == (system, *CURVES[1]):
                static, even = (at[row.stack, system, row.ranks, *curve] for curve in CURVES[:2])
                fitted = at[row.stack, system, row.ranks, *CURVES[2]]
                shares = (fitted.gate_ms + fitted.move_ms, fitted.exchange_ms, fitted.experts_ms, fitted.rest_ms)
                body.append((
                    row.stack, row.ranks, row.nodes, *(_ms(each.step_ms) for each in (static, even, fitted)),
                    f"{static.step_ms / even.step_ms:.1f}x",
                    f"{even.step_ms / fitted.step_ms - 1:+.1%}", f"{even.largest_share:.2f}",
                    f"{fitted.largest_share:.2f}", *(f"{share / fitted.step_ms:.0%}" for share in shares),
                ))
        head = ("stack", "ranks", "nodes", "static ms", "dynamic ms", "balanced ms", "dynamic over static",
                "balancing gains", "busiest rank", "balanced", "gate, order", "exchange", "experts", "rest")
        sources = "".join(f"\n- {source}" for source in described.sources)
        parts.append(f"## {described.title}\n\n" + (f"Given:{sources}\n\n" if sources else "") + markdown(head, body))
    tokens = ", ".join(f"{row.stack} {row.tokens:,}" for row in {row.stack: row for row in rows}.values())
    intro = (
        "A step of the published models, modelled: recorded routing, costs measured on this machine and carried over "
        "to each device, bandwidths as given; docs/scaling_model.md has the assumptions, the end of this page how far "
        f"to trust them. Tokens of a rank: {tokens}. Busiest rank: its rows over the mean. The last four columns: "
        "where the balanced step's time goes."
    )
    return "\n\n".join([intro, *parts, _beside(at)])


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _beside(at: At) -> str:
    """The paper's maximum throughputs, each at its best batch, beside ratios of steps of one batch."""
    found = []
    for stack, key in KEYS.items():
        several = [ranks for each, system, ranks, *_ in at if (each, system) == (stack, "paper") and 8 < ranks <= 32]
        if (stack, "paper", 8, *CURVES[0]) in at:
            found.append((f"throughput.{key}.over-static", f"{speedup(at, stack, 'paper', 8):.2f}x"))
        if several:
            best = max(speedup(at, stack, "paper", ranks) for ranks in several)
            found.append((f"throughput.{key}.several-nodes", f"{best:.2f}x"))
    return "## Beside the paper\n\n" + beside_paper(found) if found else ""


def findings(rows: Sequence[ScalingRow]) -> list[Finding]:
    at, found = _index(rows), []
    for (stack, kind), of_stack in grouped([row for row in rows if row.system == "paper"], "stack", "kind").items():
        ranks = sorted(unique(of_stack, "ranks"))
        papers = [each for each in ranks if -(-each // 8) in PAPERS_NODES] or ranks
        gains = [speedup(at, stack, "paper", each) for each in papers]
        words = ", ".join(f"{gain:.1f}x on {each} ranks" for each, gain in zip(papers, gains, strict=True))
        found.append(Finding(
            f"dynamic gating is faster than static ({kind})", "section on throughput",
            "modelled on the paper's system: at every number of ranks that it had", f"{words} ({stack})",
            min(gains) > 1,
        ))
        found.append(Finding(
            f"the gain grows with the nodes ({kind})", "section on throughput",
            "modelled on the paper's system: on its most nodes above that on one", f"{words} ({stack})",
            gains[-1] > gains[0] if len(gains) > 1 else None,
        ))
        first = papers[0]
        gain = speedup(at, stack, "paper", first, *CURVES[1:]) - 1
        wanted = paper_value(f"balancing.{KEYS[kind]}.throughput")
        found.append(Finding(
            f"balanced placement raises throughput, by {wanted:.1%} ({kind})", "section on load balancing",
            f"modelled on the paper's system, {first} ranks, held-out half: at least 1%", f"{gain:+.1%} ({stack})",
            gain >= 0.01,
        ))
    return found


def draw_scaling(file: Path, rows: Sequence[ScalingRow]) -> None:
    """Milliseconds of a step against ranks; a column per stack, a row per system."""
    stacks, names = unique(rows, "stack"), unique(rows, "system")
    figure, axes = panels(len(names), len(stacks), width=4.4, height=3.1, sharex=True)
    curves = grouped(rows, "stack", "system", "gating", "placement")
    titles = {"paper": "paper's GPUs and network", "today": "today's", "threads": "this machine's threads"}
    for of_system, system in zip(axes, names, strict=True):
        for panel, stack in zip(of_system, stacks, strict=True):
            for number, (gating, placement) in enumerate(CURVES):
                curve = curves[stack, system, gating, placement]
                panel.plot([row.ranks for row in curve], [row.step_ms for row in curve],
                           label=gating if gating == "static" else f"{gating}, {placement}", **look(number))
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(f"{stack}: {titles.get(system, 'as given')}", fontsize=10)
        of_system[0].set_ylabel("ms of a step (modelled)")
    ticks = sorted({row.ranks for row in rows})
    for panel in axes[-1]:
        panel.set_xticks(ticks, [str(each) for each in ticks])
        panel.set_xlabel("ranks, 8 on a node")
    axes[0][0].legend(fontsize=8)
    save(figure, file)


def make(study: Study) -> str:
    rows: list[ScalingRow] = []
    with tqdm(total=len(study.models) + 2, unit="part") as bar:
        bar.set_description("measuring costs")
        device, costs = _device_and_costs(study)
        known = wanted_systems(study, device)
        bar.update()
        for model in study.models:
            bar.set_description(f"{model.name}, modelling")
            trace = run(study.runs, model, study.args.subset, rows=model.few_rows).trace
            stacks = stacks_of(model, trace)
            for stack in stacks:
                rows += scale_stack(stack, known, costs, study.args.ranks)
            bar.update()
        bar.set_description(f"real ranks, {model.name}")
        identity = identity_of(model, arguments_of(model, study.args.subset, model.few_rows), 0)
        found = remembered(
            study.output / "validation.json", identity, lambda: [asdict(row) for row in validate(stacks[0])]
        )
        checked = [ValidationRow(**row) for row in found]
        bar.update()
    write_csv(study.file(".csv"), rows)
    draw_scaling(study.file(".png"), rows)
    write_csv(study.file("-validation.csv"), checked)
    draw_validation(study.file("-validation.png"), checked)
    parts = ["# Beyond this machine", scaling_table(rows, known), findings_section(findings(rows)),
             validation_section(checked)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study("scaling", __doc__, make, arguments, OPTIONS)
