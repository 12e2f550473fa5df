"""How tokens get to their experts and back; here: to experts of this process, sorted by expert, nothing padded.

Paper: "Toward Efficient Inference for Mixture of Experts", section on dynamic gating.
Legend: B = sentences, L = positions, T = tokens, K = choices per token, N = rows, D = model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from fairseq_moe_ext.gating.call import Call
from fairseq_moe_ext.gating.plan import Plan, plan_by_expert
from fairseq_moe_ext.gating.routing import Routing
from fairseq_moe_ext.kernels.combine import weighted_sum


class Planned(Protocol):
    """What a dispatcher has planned for a call.

    routing: what runs, (T, K), the gate's own object where the dispatcher has dropped nothing.
    """

    routing: Routing

    @property
    def load(self) -> Sequence[int]:
        """E tokens per expert that run, of this rank's."""


class Dispatcher(Protocol):
    """gating: by what name it is asked for. counts_padding: whether padding is routed like any token. spans_ranks:
    whether tokens go to other ranks, too.
    """

    gating: str
    counts_padding: bool
    spans_ranks: bool

    def whole_call(self) -> AbstractContextManager:
        """Around a whole call of the layer."""

    def batch(self, x: Tensor, mask: Tensor | None, training: bool, serving: bool) -> tuple[Tensor, Tensor | None]:
        """x (B, L, D) and its padding mask (B, L) -> what is routed; rows behind the B sentences are cut off again."""

    def plan(self, routing: Routing, call: Call) -> Planned:
        """Where the assignments of `routing` go."""

    def run(self, planned: Planned, call: Call) -> Tensor:
        """The experts' outputs (N, D), in the plan's order."""

    def combine(self, outputs: Tensor, planned: Planned, call: Call) -> Tensor:
        """outputs (N, D) -> their weighted sum per token (T, D), zero for a token without experts."""


class Local:
    """To the experts of this process, which may be all of them: the Dispatcher of dynamic gating."""

    gating = "dynamic"
    counts_padding = False
    spans_ranks = False

    def whole_call(self) -> AbstractContextManager:
        """As `Dispatcher` has it: nothing."""
        return nullcontext()

    def batch(self, x: Tensor, mask: Tensor | None, training: bool, serving: bool) -> tuple[Tensor, Tensor | None]:
        """As `Dispatcher` has it: unchanged."""
        return x, mask

    def plan(self, routing: Routing, call: Call) -> Plan:
        """As `Dispatcher` has it: sorted by expert; a buffer is given the counts."""
        plan = plan_by_expert(routing, call.gate.combine_weights(routing))
        call.experts.prefetch(plan.load)
        return plan

    def run(self, planned: Plan, call: Call) -> Tensor:
        """As `Dispatcher` has it."""
        token_ids = planned.token_ids
        call.clock.lap("dispatch")
        outputs = call.experts.run(call.tokens, planned.offsets, token_ids)
        call.clock.lap("experts")
        return outputs

    def combine(self, outputs: Tensor, planned: Plan, call: Call) -> Tensor:
        """As `Dispatcher` has it."""
        return weighted_sum(outputs, planned.row_ids, planned.weights)
