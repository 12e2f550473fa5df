"""The exchange between ranks: the sizes travel first, then exactly the tokens, and their outputs back.

Every call of a MoE layer on any rank is one round, in which all ranks take part. They need not be in the same layer: a
message says which one its sender is in, and the receiver runs that layer's experts. So ranks with different numbers of
batches, sentences or decode steps never wait for one another's next batch; a rank with nothing to send (`idle_round`)
computes for the others. A round is over at once when no rank is in a layer.

Paper: "Toward Efficient Inference for Mixture of Experts", section on dynamic gating. Static gating sends the padded
slots of every expert instead, as upstream does.

Legend: R = ranks, P = replicas of a layer's experts over all ranks, H = local experts, N = rows sent, D = model dim,
E = experts, C = slots per expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fairseq_moe_ext.experts.gradients import without_gradients
from fairseq_moe_ext.gating.call import Experts
from fairseq_moe_ext.gating.replicas import Replicas
from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.process_group import RankGroup
from fairseq_moe_ext.ranks.round import HEADER, IDLE, Message, Round, RoundFigures


class Exchange:
    """One rank's end. Layers are registered in the same order on every rank before the first round.

    finished: batches that this rank has finished, told to the others with every round.
    heard_finished: what each rank last told. rows_computed: per layer, rows that ran here, whoever sent them.
    fault: why the ranks cannot exchange anything any more; None: they can. interrupt: a signal that this rank got and
    tells with its next round, in which all ranks break off. interrupted: (rank, signal) in the ranks' last round.
    """

    def __init__(self, group: RankGroup):
        self.group = group
        self.rank, self.world_size = group.rank, group.world_size
        self.finished = 0
        self.heard_finished = [0] * group.world_size
        self.rounds = self.idle_rounds = 0
        self.rows_computed: list[int] = []
        self.fault: str | None = None
        self.interrupt = 0
        self.interrupted: tuple[int, int] | None = None
        self.layers: list[LayerExchange] = []
        self.under_way: Round | None = None

    def register(self, experts: Experts, replicas: Replicas) -> LayerExchange:
        """The exchange of one more layer; `experts` are the local ones."""
        self.layers.append(LayerExchange(self, len(self.layers), experts, replicas))
        self.rows_computed.append(0)
        return self.layers[-1]

    def idle_round(self, alive: bool) -> bool:
        """Answer one round with nothing to send; whether any rank has work of its own left, `alive` being ours."""
        with self.whole_rounds():
            self.idle_rounds += 1
            round_ = Round(self, IDLE, alive)
            round_.receive_sizes()
            round_.exchange(torch.empty(0, dtype=torch.uint8, device=self.device), [0] * self.world_size)
            return any(message.alive for message in round_.messages)

    @contextmanager
    def whole_rounds(self) -> Iterator[None]:
        """Context of a call that may take part in a round.

        After an error in it the others would wait for what is not to come, or take the next round's sizes for tokens:
        so it is told to them, and the group ends. ExchangeError where it has ended.
        """
        if self.fault is not None:
            raise ExchangeError(f"the group of ranks cannot be used any more: {self.fault}", self.fault)
        try:
            yield
        except ExchangeError as error:
            self.fault = error.fault or str(error)
            self.abandon()
            raise
        except BaseException as error:
            self.abandon()
            if self.interrupted is not None:  # on all ranks alike; what they have sent may still be received
                self.fault = f"rank {self.interrupted[0]} of {self.world_size} was interrupted"
                raise
            self.tell(error)
            self.group.end()
            raise

    def abandon(self) -> None:
        """Hold nothing of the group any more, which would keep its connections open."""
        if self.under_way is not None:
            self.under_way.abandon()

    def tell(self, error: BaseException) -> None:
        """Leave word for the other ranks of why this one breaks off."""
        self.fault = f"rank {self.rank} of {self.world_size} failed: {type(error).__name__}: {error}"
        self.group.leave_word(self.fault)

    @property
    def has_layers(self) -> bool:
        """Whether any layer takes part."""
        return bool(self.layers)

    @property
    def device(self) -> torch.device:
        """Where messages and tokens travel: where the model is."""
        return self.layers[0].experts.device if self.layers else torch.device("cpu")

    @property
    def message_size(self) -> int:
        """int64 numbers in one rank's message of sizes."""
        return HEADER + max((max(layer.replicas.per_rank) for layer in self.layers), default=0)


class LayerExchange:
    """One layer's end on this rank."""

    def __init__(self, exchange: Exchange, number: int, experts: Experts, replicas: Replicas):
        self.number = number
        self.experts = experts
        self.replicas = replicas
        self._exchange = exchange
        local = torch.tensor(replicas.per_rank)
        ranks = torch.repeat_interleave(torch.arange(len(local)), local)
        self._round: Round | None = None
        self._place = torch.stack((ranks, torch.arange(len(ranks)) - (local.cumsum(0) - local)[ranks]))  # (2, P)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._exchange.rank

    def whole_rounds(self):
        """As `Exchange.whole_rounds`."""
        return self._exchange.whole_rounds()

    def begin(self, counts: Tensor) -> None:
        """Send the sizes, `counts` (P,) int64 rows per replica, while the caller sorts; `run` ends the round."""
        self._round = Round(self._exchange, self.number, alive=True, counts=counts, place=self._place)

    def run(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, RoundFigures]:
        """rows (N, D) in the order of replicas, counts P numbers that sum to N -> the experts' outputs (N, D)."""
        round_, self._round = self._round, None
        round_.receive_sizes()
        sent = [sum(part) * _row_bytes(rows) for part in _split(counts, self.replicas.per_rank)]
        returned = round_.exchange(rows.reshape(-1).view(torch.uint8), sent)
        outputs = returned.view(rows.dtype).view(rows.shape)
        return without_gradients("experts on several ranks", outputs, rows), round_.figures

    def run_static(self, slots: Tensor) -> tuple[Tensor, RoundFigures]:
        """slots (E, C, D), empty ones zero -> their outputs (E, C, D); all ranks send as many rows per expert."""
        num_experts, capacity, model_dim = slots.shape
        round_ = Round(self._exchange, self.number, alive=True, capacity=capacity)
        round_.receive_sizes()
        largest = round_.largest_capacity if capacity else 0  # no tokens, hence no slots
        chosen = self.replicas.chosen_whole(self._exchange.rank)
        order = torch.tensor(sorted(range(num_experts), key=chosen.__getitem__), device=slots.device)
        padded = slots.new_zeros(num_experts, largest, model_dim)
        padded[:, :capacity] = slots[order]
        counts = [0] * self.replicas.num_replicas
        for replica in chosen:
            counts[replica] = largest
        sent = [sum(part) * _row_bytes(slots) for part in _split(counts, self.replicas.per_rank)]
        returned = round_.exchange(padded.view(-1).view(torch.uint8), sent)
        outputs = torch.empty_like(slots)
        outputs[order] = returned.view(slots.dtype).view(padded.shape)[:, :capacity]
        return without_gradients("experts on several ranks", outputs, slots), round_.figures

    def counts_from(self, source: int, message: Message, largest_capacity: int) -> list[int]:
        """H rows per expert that `source` sends."""
        if message.capacity == 0:
            return message.counts[: self.replicas.per_rank[self._exchange.rank]]
        chosen = set(self.replicas.chosen_whole(source))
        first = sum(self.replicas.per_rank[: self._exchange.rank])
        local = range(first, first + self.replicas.per_rank[self._exchange.rank])
        return [largest_capacity if replica in chosen else 0 for replica in local]


def _split(counts: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(counts[start : start + size])
        start += size
    return parts


def _row_bytes(rows: Tensor) -> int:
    return rows.size(-1) * rows.element_size()
