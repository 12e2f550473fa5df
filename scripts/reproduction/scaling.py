"""A step of the published models on 8 to 256 ranks: modelled on recorded routing, measured costs and given bandwidths.

    bash scripts/reproduce_scaling.sh
    bash scripts/reproduce_scaling.sh --nvlink 300 --pcie 32 --network 25      # one more system, in GB/s

The routing is what CHECKPOINT chose on DATA, stretched to the published numbers of experts; docs/scaling_model.md says
what else is assumed. results/scaling/ gets scaling.csv, scaling.md and scaling.png; scaling-validation.csv and .png are
the same model beside real ranks over gloo on this machine.
Source of what is compared: "Toward Efficient Inference for Mixture of Experts", sections on throughput and balancing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from tqdm import tqdm

from reproduction.cluster import Device, System, systems
from reproduction.layer_costs import LayerCosts, measure_costs, measure_device
from reproduction.models import arguments_of
from reproduction.runs import identity_of, remembered, run
from reproduction.scaling_rows import SHAPES, ScalingRow, scale_stack
from reproduction.scaling_tables import draw_scaling, findings, scaling_table
from reproduction.scaling_validation import ValidationRow, draw_validation, validate, validation_section
from reproduction.stacks import stacks_of
from reproduction.study import Option, Study, run_study
from reproduction.tables import findings_section, write_csv

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
