"""Batch sizes around the paper's, and what was measured at each: characterization, throughput and memory share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from reproduction.models import Model, arguments_of
from reproduction.paper import paper_value
from reproduction.passes import Batches, Pass
from reproduction.runs import identity_of, remembered
from reproduction.stacks import DECODER, ENCODER, LM
from reproduction.study import Study

STEPS_DOWN = 3  # halvings of the paper's batch
PAPER_KEYS = {LM: "lm", ENCODER: "mt-encoder", DECODER: "mt-decoder"}


class Ladder:
    """One model's batches. base: the paper's batch for its kind; small: up to it, by doubling."""

    def __init__(self, study: Study, model: Model):
        self._study, self._model, self._batches = study, model, None
        self.fraction = study.args.capacity_fraction
        if not self.fraction > 0:
            raise ValueError(f"--capacity-fraction must be above 0, got {self.fraction}")
        self.base: int = paper_value(f"characterisation.{'mt' if model.translates else 'lm'}.batch")
        self.small = [max(1, self.base >> down) for down in range(STEPS_DOWN, -1, -1)]

    def measure(self, rows: int, gatings: Sequence[str]) -> list[Pass]:
        """A batch of `rows` under each gating; from the folder of runs where it was done before."""
        arguments = arguments_of(self._model, self._study.args.subset, rows)
        identity = identity_of(self._model, arguments, 1) | {"gatings": list(gatings), "fraction": self.fraction}
        name = "-".join(("passes", self._study.args.subset, str(rows), *gatings)).replace(" ", "-")
        file = self._study.runs / self._model.name / f"{name}.json"
        return [Pass(**each) for each in remembered(file, identity, lambda: self._measure(rows, gatings))]

    def _measure(self, rows: int, gatings: Sequence[str]) -> list[dict[str, Any]]:
        if self._batches is None:  # loaded where something is left to measure
            self._batches = Batches(self._model, self._study.args.subset, self.fraction)
        with torch.no_grad():
            return [asdict(each) for each in self._batches.measure(rows, gatings)]


def waste_sentence(passes: Sequence[Pass]) -> str:
    """Why our figures differ from the paper's: how much padding there is to begin with."""
    here = ", ".join(sorted({f"{each.waste_factor:g}" for each in passes}))
    there = f"{paper_value('lm.waste-factor'):g} (LM) and {paper_value('mt.waste-factor'):g} (MT)"
    weights = max(each.parameter_bytes for each in passes) / 1e6
    return (
        f"Why they differ: static gating has E * C / K slots for every assignment, here {here}, in the paper {there}; "
        "its mask and the product with it grow with the square of the batch's tokens, which a CPU core feels more than "
        f"a GPU does; and in models of at most {weights:,.0f} MB of weights what is outside the experts weighs more."
    )


def one_of(passes: Sequence[Pass], **wanted: Any) -> Pass | None:
    """The first with these fields."""
    return next((each for each in passes if all(getattr(each, k) == v for k, v in wanted.items())), None)
