"""Table, picture and findings of the modelled steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reproduction.cluster import System
from reproduction.paper import beside_paper, paper_value
from reproduction.plots import COLOURS, MARKERS, panels, save
from reproduction.scaling_rows import ScalingRow
from reproduction.tables import Finding, markdown

CURVES = (("static", "contiguous"), ("dynamic", "contiguous"), ("dynamic", "balanced"))
KEYS = {"LM": "lm", "MT encoder": "mt-encoder", "MT decoder": "mt-decoder"}
PAPERS_NODES = (1, 2, 4)

At = dict[tuple[str, str, int, str, str], ScalingRow]


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
    for stack, kind in {row.stack: row.kind for row in rows}.items():
        ranks = sorted({row.ranks for row in rows if row.stack == stack and row.system == "paper"})
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
    stacks, names = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("stack", "system"))
    figure, axes = panels(len(names), len(stacks), width=4.4, height=3.1, sharex=True)
    titles = {"paper": "paper's GPUs and network", "today": "today's", "threads": "this machine's threads"}
    for of_system, system in zip(axes, names, strict=True):
        for panel, stack in zip(of_system, stacks, strict=True):
            for number, (gating, placement) in enumerate(CURVES):
                curve = [row for row in rows if (row.stack, row.system, row.gating, row.placement)
                         == (stack, system, gating, placement)]
                panel.plot([row.ranks for row in curve], [row.step_ms for row in curve], color=COLOURS[number],
                           marker=MARKERS[number], label=gating if gating == "static" else f"{gating}, {placement}")
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


