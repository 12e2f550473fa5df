"""A rule changes what the gate has chosen, before anything moves: limits, pruning, other choices."""

from __future__ import annotations

from typing import Protocol

from fairseq_moe_ext.gating.call import Call
from fairseq_moe_ext.gating.routing import Routing


class Rule(Protocol):
    """Rules of a layer follow one another; the gate normalises the weights after the last one, unless a rule has set
    them for good (Routing.is_weighted)."""

    def __call__(self, routing: Routing, call: Call) -> Routing:
        """The routing under this rule; the same object where it changes nothing."""

    def seed(self, seed: int) -> None:
        """Begin the stream that the rule draws from, if it does."""
