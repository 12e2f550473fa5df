"""What computation costs, from the report of a served run whose experts were all resident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fairseq_moe_ext.bounded_json import read_json
from fairseq_moe_ext.buffering.model_calls import ModelCall
from fairseq_moe_ext.buffering.rates import Rates

STACKS = {"encoder": "encoder", "prefill": "decoder", "decode": "decoder"}  # phase -> where its seconds stand


def rates_of_report(path: Path, calls: Sequence[ModelCall], rates: Rates) -> dict[str, Rates]:
    """Phase -> `rates` with expert_seconds and dense_seconds of that run, means over its calls; a row costs nothing
    besides.

    calls: of the same run, by its trace. ValueError where the file is no report of them, or of a run with misses.
    """
    try:
        report = read_json(path)
        experts = {layer["name"]: float(layer["seconds"]["experts"]) for layer in report["layers"]}
        misses = sum(int(layer["misses"]) for layer in report["layers"])
        seconds = {stack: float(report[stack]["seconds"]) for stack in set(STACKS.values()) & report.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--report must be what --moe-report wrote, got {path}: {error!r}") from error
    if misses:
        raise ValueError(f"--report must be of a run with all experts resident, got {path} with {misses} misses")
    found = {}
    for stack in seconds:
        of_stack = [call for call in calls if STACKS[call.phase] == stack]
        layers = {call.layer for call in of_stack}
        if not layers <= experts.keys() or not of_stack:
            raise ValueError(f"--report must be of the trace's run, {path} has no {', '.join(layers) or stack}")
        on_experts = sum(experts[name] for name in layers)
        told = {
            "expert_seconds": on_experts / sum(len(call.active()) for call in of_stack),
            "dense_seconds": max(0.0, seconds[stack] - on_experts) / len(of_stack),
            "row_seconds": 0.0,
        }
        found |= {call.phase: replace(rates, **told) for call in of_stack}
    return found
