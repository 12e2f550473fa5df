"""Table 1: parameters, experts, capacity and dims of the registered architectures, beside the paper's.

    bash scripts/reproduce_configurations.sh

Parameters are counted on models without weights. results/configurations/ gets configurations.csv, configurations.md and
configurations.png. A checkpoint of one's own (CHECKPOINT, DATA) gets a row of its own.
Source: "Toward Efficient Inference for Mixture of Experts", Table 1.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from decimal import Decimal

from fairseq.models import ARCH_CONFIG_REGISTRY
from tqdm import tqdm

from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize
from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.serving.memory_plan import ModelSizes, read_sizes, shapes_of_architecture
from reproduction.models import Model
from reproduction.paper import format_number, paper_figures, paper_value
from reproduction.plots import COLOURS, panels, save
from reproduction.study import Study, run_study
from reproduction.tables import Finding, findings_section, markdown, write_csv

ARCHITECTURES = {"lm": "moe_transformer_lm_52b", "lm-small": "moe_transformer_lm_15b", "mt": "moe_transformer_nllb_54b"}
TITLES = {"lm": "LM", "lm-small": "LM-Small", "mt": "MT (NLLB)"}


@dataclass(frozen=True)
class Row:
    """One configuration, the paper's or ours; None where it is not known. expert_parameters: in experts, of all."""

    model: str
    whose: str
    dense_parameters: float | None
    parameters: float
    expert_parameters: float | None
    experts: int
    moe_every: int | None
    capacity: float | None
    layers: str
    model_dim: int
    hidden_dim: int
    vocabulary: int


COMPARED = tuple(item.name for item in fields(Row)[2:] if item.name != "expert_parameters")


def published(key: str) -> Row:
    """The paper's row."""
    values = {name: paper_value(f"{key}.{name.replace('_', '-')}") for name in COMPARED}
    return Row(TITLES[key], "paper", expert_parameters=None, **values)


def registered(key: str) -> Row:
    """The same of our architecture, with the paper's vocabulary, which is the data's."""
    name, vocabulary = ARCHITECTURES[key], paper_value(f"{key}.vocabulary")
    args = Namespace()
    ARCH_CONFIG_REGISTRY[name](args)
    moe = MoEConfig.from_args(args)
    sizes = ModelSizes.of_shapes(shapes_of_architecture(name, vocabulary))
    sides = [side for side in ("encoder", "decoder") if hasattr(args, f"{side}_layers")]
    return Row(
        model=TITLES[key],
        whose=name,
        dense_parameters=ModelSizes.of_shapes(shapes_of_architecture(name, vocabulary, moe_freq=0)).parameters,
        parameters=sizes.parameters,
        expert_parameters=sizes.parameters - sizes.dense,
        experts=moe.moe_expert_count,
        moe_every=moe.decoder_moe_freq,
        capacity=moe.moe_eval_capacity_token_fraction,
        layers=" + ".join(str(getattr(args, f"{side}_layers")) for side in sides),
        model_dim=args.decoder_embed_dim,
        hidden_dim=args.decoder_ffn_embed_dim,
        vocabulary=sizes.vocabulary,
    )


def own(model: Model) -> Row:
    """A checkpoint's, by its tensors' shapes."""
    summary, sizes = summarize(str(model.checkpoint)), read_sizes(str(model.checkpoint))
    layers, moe_layers = sum(summary.layers.values()), sum(map(len, summary.moe_layers.values()))
    return Row(
        model=model.title,
        whose=summary.architecture,
        dense_parameters=None,
        parameters=sizes.parameters,
        expert_parameters=sizes.parameters - sizes.dense,
        experts=summary.experts,
        moe_every=layers // moe_layers if moe_layers else None,
        capacity=None,
        layers=" + ".join(map(str, summary.layers.values())),
        model_dim=summary.model_dim,
        hidden_dim=summary.hidden_dim,
        vocabulary=summary.vocabulary,
    )


def compare(paper: Row, ours: Row) -> Finding:
    """Whether an architecture is the published one."""
    differ = []
    for name in COMPARED:
        wanted, found = getattr(paper, name), getattr(ours, name)
        if abs(found - wanted) > last_digit(wanted) if name.endswith("parameters") else found != wanted:
            differ.append(f"{name.replace('_', ' ')} {format_number(found)}, the paper's {format_number(wanted)}")
    shares = [getattr(ours, name) / getattr(paper, name) for name in ("dense_parameters", "parameters")]
    same = f"all equal; parameters {shares[0] - 1:+.1%} (dense) and {shares[1] - 1:+.1%} (MoE)"
    source = paper_figures()[f"{next(key for key, title in TITLES.items() if title == paper.model)}.parameters"].place
    says = f"{paper.model} has {format_number(paper.parameters)} parameters at these dims"
    rule = "equal in every column, parameters within one of the last digit that the paper gives"
    return Finding(says, source, rule, f"`{ours.whose}`: " + ("; ".join(differ) or same), not differ)


def last_digit(value: float) -> float:
    """What the last digit that is not 0 counts.

    >>> last_digit(54.5e9), last_digit(355e6)
    (100000000.0, 1000000.0)
    """
    return float(10 ** Decimal(f"{value:.10g}").normalize().as_tuple().exponent)


def table(rows: Sequence[Row]) -> str:
    head = ("model", "", "dense parameters", "MoE parameters", "of them in experts", "E", "MoE every", "capacity C",
            "layers", "model dim", "hidden dim", "vocabulary")
    body = []
    for row in rows:
        experts = None if row.expert_parameters is None else f"{row.expert_parameters / row.parameters:.1%}"
        numbers = (row.experts, row.moe_every, row.capacity, row.layers, row.model_dim, row.hidden_dim, row.vocabulary)
        counts = [None if count is None else format_number(count) for count in (row.dense_parameters, row.parameters)]
        cells = (None if value is None else format_number(value) for value in numbers)
        body.append((row.model, row.whose, *counts, experts, *cells))
    return markdown(head, body)


def draw(file, rows: Sequence[Row]) -> None:
    """Where the parameters are: experts and the rest; the paper's total as a mark."""
    ours = [row for row in rows if row.expert_parameters is not None]
    totals = {row.model: row.parameters for row in rows if row.whose == "paper"}
    figure, ((panel,),) = panels(1, 1, width=7.0, height=1.2 + 0.7 * len(ours))
    for number, row in enumerate(ours):
        parts = ((row.parameters - row.expert_parameters, COLOURS[0]), (row.expert_parameters, COLOURS[4]))
        start = 0.0
        for part, colour in parts:
            panel.barh(number, part / 1e9, left=start, color=colour, height=0.6)
            start += part / 1e9
        if row.model in totals:
            panel.plot(totals[row.model] / 1e9, number, "k|", markersize=26, markeredgewidth=2)
        panel.text(start, number, f"  {format_number(row.parameters)}", va="center")
    panel.barh(0, 0, color=COLOURS[0], label="all but experts")
    panel.barh(0, 0, color=COLOURS[4], label="experts")
    panel.plot([], [], "k|", markersize=10, markeredgewidth=2, label="the paper's total")
    panel.set(yticks=range(len(ours)), yticklabels=[f"{row.model}\n{row.whose}" for row in ours],
              xlabel="parameters, in billions", xlim=(0, 1.16 * max(row.parameters for row in ours) / 1e9))
    panel.invert_yaxis()
    figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    save(figure, file)


def make(study: Study) -> str:
    rows, findings = [], []
    for key in tqdm(ARCHITECTURES, unit="architecture"):
        rows += [published(key), registered(key)]
        findings.append(compare(*rows[-2:]))
    rows += [own(model) for model in study.models]
    write_csv(study.file(".csv"), rows)
    draw(study.file(".png"), rows)
    intro = "Parameters are counted on models without weights; vocabularies are the data's, here the paper's."
    return "\n\n".join(["# Configurations", intro, table(rows), findings_section(findings)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study("configurations", __doc__, make, arguments, models=None)
