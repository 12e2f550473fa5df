"""One Mixture-of-Experts layer: gate, rules, dispatch, experts, combine.

Legend: B = sentences, L = positions, T = tokens (B * L), E = experts, K = choices per token, D = model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fairseq_moe_ext.gating.call import Call, Clock, Experts, LayerCall, told
from fairseq_moe_ext.gating.dispatcher import Dispatcher, Local, Planned
from fairseq_moe_ext.gating.routing import Gate, Routing
from fairseq_moe_ext.gating.rules import Rule
from fairseq_moe_ext.gating.statistics import CallStatistics
from fairseq_moe_ext.kernels.autocast import autocast_dtype, no_autocast
from fairseq_moe_ext.kernels.forks import compute_alone_after_forks


class MOELayer(nn.Module):
    """The experts' feed-forward in a transformer layer; drop-in for the dense one, without residual or norm.

    gate: chooses experts. experts: rows in expert order -> outputs. dispatcher: how tokens get to them and back.
    rules: what is changed in the gate's choice, one after another.
    output_masking: upstream's `moe_eom`; in training that share of the experts' output rows is zeroed, in evaluation
    all are multiplied by one minus it.
    """

    def __init__(
        self,
        gate: Gate,
        experts: Experts,
        dispatcher: Dispatcher = Local(),
        output_masking: float = 0.0,
        rules: Sequence[Rule] = (),
    ):
        super().__init__()
        if not 0.0 <= output_masking < 1.0:
            raise ValueError(f"output_masking (moe_eom) must be in [0, 1), got {output_masking}")
        self.gate = gate
        self.experts = experts
        self.dispatcher = dispatcher
        self.rules = tuple(rules)
        self.output_masking = output_masking
        self.serving = False
        self.statistics: CallStatistics | None = None  # of the last call in training and validation
        self._observer: Callable[[LayerCall], None] | None = None

    @property
    def gating(self) -> str:
        """The dispatcher's name, `dynamic` or `static`."""
        return self.dispatcher.gating

    def use(
        self,
        experts: Experts | None = None,
        dispatcher: Dispatcher | None = None,
        rules: Sequence[Rule] | None = None,
    ) -> None:
        """Put others in the place of those that are given."""
        self.experts = self.experts if experts is None else experts
        self.dispatcher = self.dispatcher if dispatcher is None else dispatcher
        self.rules = self.rules if rules is None else tuple(rules)

    def observe(self, observer: Callable[[LayerCall], None] | None) -> None:
        """Tell `observer` of every call from here on; None: nobody."""
        self._observer = observer

    def prepare_for_serving(
        self, seed: int, observer: Callable[[LayerCall], None] | None = None, validates: bool = False
    ) -> None:
        """From here on batches are served: no rows are padded, no statistics for a loss are kept.

        seed: of the random second-expert policies. observer: called with every call's LayerCall. validates: rows are
        padded and statistics kept, as between a training's epochs.
        """
        self.serving = not validates
        compute_alone_after_forks()
        self.seed(seed)
        self.observe(observer)
        self.statistics = None

    @contextmanager
    def served(self) -> Iterator[None]:
        """In this context the layer of a training takes batches as they are, and keeps no statistics."""
        before, self.serving = self.serving, True
        try:
            yield
        finally:
            self.serving = before

    def seed(self, seed: int) -> None:
        """Begin the streams that the random policies of the gate and of the rules draw from."""
        self.gate.seed(seed)
        for rule in self.rules:
            rule.seed(seed)

    def gate_loss(self) -> Tensor:
        """The load-balancing loss of the last call (training and validation only), a scalar."""
        loss = self._statistics().gate_loss()
        if self.training and torch.is_grad_enabled() and self.gate.wg.weight.requires_grad > loss.requires_grad:
            loss = loss.detach().requires_grad_()
            loss.register_hook(_refuse_gradient)
        return loss

    def metadata(self) -> dict[str, Tensor]:
        """Upstream's metadata of the last call (training and validation only)."""
        return self._statistics().metadata()

    def recall(self, statistics: CallStatistics | None, loss: Tensor | None = None) -> None:
        """The last call is this one from here on, with that gate loss where its graph is kept elsewhere; None: none."""
        self.statistics = statistics if loss is None else replace(statistics, loss=loss)

    def _statistics(self) -> CallStatistics:
        if self.statistics is None:
            raise RuntimeError("a gate loss needs a call of the layer before it, and a layer that is not serving")
        return self.statistics

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, decoding: bool = False) -> Tensor:
        """x (B, L, D), padding_mask (B, L) bool with True on padding -> (B, L, D).

        decoding: whether this is a decode step. Padding comes out as zero, except where the dispatcher counts it.
        Under several ranks an error on any of them is one on all (ExchangeError on the others), and ends the exchange.
        Under `torch.autocast` the result has its dtype, as a dense layer's.
        """
        with self.dispatcher.whole_call():
            rows, mask = self.dispatcher.batch(x, padding_mask, self.training, self.serving)
            call = self._begin(rows, mask, decoding)
            wanted = routing = self.gate(rows.reshape(call.tokens.shape), call.padding_mask)
            call.clock.lap("gate")
            with no_autocast(x):
                for rule in self.rules:
                    routing = rule(routing, call)
                planned = self.dispatcher.plan(routing, call)
                outputs = self._mask_outputs(self.dispatcher.run(planned, call))
                result = self.dispatcher.combine(outputs, planned, call)
            call.clock.lap("combine")
            self._end(call, wanted, planned)
            return result.to(autocast_dtype(x) or x.dtype).view_as(rows)[: x.size(0)]

    def _begin(self, x: Tensor, mask: Tensor | None, decoding: bool) -> Call:
        tokens = x.reshape(-1, x.size(2))
        return Call(
            tokens.to(self.experts.input_dtype(tokens)),
            None if mask is None else mask.reshape(-1),
            x.size(0),
            self.training,
            decoding,
            self.gate,
            self.experts,
            Clock(self._observer is not None),
        )

    def _mask_outputs(self, outputs: Tensor) -> Tensor:
        if self.output_masking == 0.0:
            return outputs
        if self.training:
            survives = torch.rand(outputs.size(0), 1, device=outputs.device) > self.output_masking
            return outputs * survives
        return outputs * (1 - self.output_masking)

    def _end(self, call: Call, wanted: Routing, planned: Planned) -> None:
        if not self.serving:
            self.statistics = CallStatistics(wanted, planned.routing)
        if self._observer is not None:
            self._observer(told(call, wanted, planned.routing, planned.load, has_rules=bool(self.rules)))


def _refuse_gradient(_gradient: Tensor) -> None:
    raise RuntimeError(
        "the gate loss has no gradient, since the layer's last call ran without one: of activation checkpoints "
        "--checkpoint-activations alone keeps it"
    )
