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

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_moe_ext.experts.gradients import without_gradients
from fairseq_moe_ext.gating.call import Experts
from fairseq_moe_ext.gating.replicas import Replicas
from fairseq_moe_ext.ranks.faults import ExchangeError, interruption
from fairseq_moe_ext.ranks.process_group import RankGroup

IDLE = -1  # stands for a layer's number where a rank is in none


@dataclass(frozen=True)
class Message:
    """What a rank tells another in a round.

    layer: which one the sender is in, or IDLE. alive: whether it has work of its own left. finished: batches that it
    has finished. capacity: C, 0 under dynamic gating. interrupt: the signal that ends the sender, or 0. counts: rows
    that follow for each of the receiver's experts.
    """

    layer: int
    alive: bool
    finished: int
    capacity: int
    interrupt: int
    counts: list[int]


HEADER = 5  # numbers of a message before its counts


@dataclass
class RoundFigures:
    """What a round cost this rank: bytes of tokens sent to other ranks (as many come back), host seconds per part."""

    bytes_exchanged: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"sizes": 0.0, "exchange": 0.0, "experts": 0.0})


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
        self._layers: list[LayerExchange] = []
        self._round: Round | None = None  # under way

    def register(self, experts: Experts, replicas: Replicas) -> LayerExchange:
        """The exchange of one more layer; `experts` are the local ones."""
        self._layers.append(LayerExchange(self, len(self._layers), experts, replicas))
        self.rows_computed.append(0)
        return self._layers[-1]

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
        if self._round is not None:
            self._round.abandon()

    def tell(self, error: BaseException) -> None:
        """Leave word for the other ranks of why this one breaks off."""
        self.fault = f"rank {self.rank} of {self.world_size} failed: {type(error).__name__}: {error}"
        self.group.leave_word(self.fault)

    @property
    def has_layers(self) -> bool:
        return bool(self._layers)

    @property
    def device(self) -> torch.device:
        """Where messages and tokens travel: where the model is."""
        return self._layers[0].experts.device if self._layers else torch.device("cpu")

    @property
    def message_size(self) -> int:
        return HEADER + max((max(layer.replicas.per_rank) for layer in self._layers), default=0)


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
        return self._exchange.rank

    def whole_rounds(self):
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


class Round:
    """One round on this rank: the sizes are on their way from the start."""

    def __init__(
        self,
        exchange: Exchange,
        layer: int,
        alive: bool,
        capacity: int = 0,
        counts: Tensor | None = None,
        place: Tensor | None = None,
    ):
        self.figures = RoundFigures()
        self.messages: list[Message] = []
        self._exchange = exchange
        exchange.rounds += 1
        exchange._round = self
        header = torch.tensor([layer, alive, exchange.finished, capacity, exchange.interrupt])
        self._sent = torch.zeros(exchange.world_size, exchange.message_size, dtype=torch.int64, device=exchange.device)
        self._sent[:, :HEADER] = header.to(exchange.device)
        if counts is not None:
            self._sent[:, HEADER:][tuple(place.to(exchange.device))] = counts.to(exchange.device)
        self._received = torch.empty_like(self._sent)
        with exchange.group.naming_the_fault():
            self._work = exchange.group.all_to_all(self._received, self._sent)

    @property
    def largest_capacity(self) -> int:
        return max(message.capacity for message in self.messages)

    def receive_sizes(self) -> None:
        """Wait for every rank's message. Where one was interrupted, all ranks break off here, between two messages."""
        start = time.perf_counter()
        with self._exchange.group.naming_the_fault():
            self._work.wait()
            received = self._received.tolist()
        self.messages = [
            Message(layer, bool(alive), finished, capacity, interrupt, counts)
            for layer, alive, finished, capacity, interrupt, *counts in received
        ]
        self._exchange.heard_finished = [message.finished for message in self.messages]
        self.figures.seconds["sizes"] = time.perf_counter() - start
        for rank, message in enumerate(self.messages):
            if message.interrupt:
                self._exchange.interrupted = rank, message.interrupt
                raise interruption(message.interrupt)

    def exchange(self, sent: Tensor, sent_bytes: list[int]) -> Tensor:
        """sent (bytes,) uint8, grouped by the R ranks as `sent_bytes` says -> the outputs' bytes in the same order."""
        if all(message.layer == IDLE for message in self.messages):
            self.abandon()
            return sent
        start = time.perf_counter()
        arrivals = [self._arrivals_from(source) for source in range(self._exchange.world_size)]
        self._prefetch(arrivals)
        arrived_bytes = [arrival.num_bytes for arrival in arrivals]
        arrived = sent.new_empty(sum(arrived_bytes))
        self.figures.bytes_exchanged = sum(sent_bytes) - sent_bytes[self._exchange.rank]
        self._all_to_all(arrived, sent, arrived_bytes, sent_bytes)
        lap = time.perf_counter()
        outputs = self._compute(arrived, arrivals)
        self.figures.seconds["experts"] = time.perf_counter() - lap
        returned = torch.empty_like(sent)
        self._all_to_all(returned, outputs, sent_bytes, arrived_bytes)
        self.abandon()
        self.figures.seconds["exchange"] = time.perf_counter() - start - self.figures.seconds["experts"]
        return returned

    def _all_to_all(self, received: Tensor, sent: Tensor, received_bytes: list[int], sent_bytes: list[int]) -> None:
        with self._exchange.group.naming_the_fault():
            self._work = self._exchange.group.all_to_all(received, sent, received_bytes, sent_bytes)
            self._work.wait()

    def abandon(self) -> None:
        """Hold nothing of the group any more, which would keep its connections open."""
        self._work = self._exchange._round = None

    def _arrivals_from(self, source: int) -> _Arrivals:
        message = self.messages[source]
        if message.layer == IDLE:
            return _Arrivals(None, [], 0)
        layer = self._exchange._layers[message.layer]
        counts = layer.counts_from(source, message, self.largest_capacity)
        return _Arrivals(layer, counts, sum(counts) * layer.experts.model_dim * layer.experts.dtype.itemsize)

    def _prefetch(self, arrivals: list[_Arrivals]) -> None:
        """Tell the experts what is to come, so that those in a buffer are fetched while the tokens travel."""
        for layer in _layers_of(arrivals):
            counts = [arrival.counts for arrival in arrivals if arrival.layer is layer]
            totals = [sum(column) for column in zip(*counts, strict=True)]
            if any(totals):
                layer.experts.prefetch(totals)

    def _compute(self, arrived: Tensor, arrivals: list[_Arrivals]) -> Tensor:
        """arrived (bytes,), grouped by source -> the outputs' bytes in the same order."""
        outputs = torch.empty_like(arrived)
        sizes = [arrival.num_bytes for arrival in arrivals]
        parts, out_parts = arrived.split(sizes), outputs.split(sizes)
        for layer in _layers_of(arrivals):
            dtype, model_dim = layer.experts.dtype, layer.experts.model_dim
            sources = [
                source for source, arrival in enumerate(arrivals) if arrival.layer is layer and arrival.num_bytes > 0
            ]
            if not sources:
                continue
            rows = [_as_values(parts[source], dtype).view(-1, model_dim) for source in sources]
            results = _run_by_expert(layer.experts, rows, [arrivals[source].counts for source in sources])
            self._exchange.rows_computed[layer.number] += sum(map(len, rows))
            for source, result in zip(sources, results, strict=True):
                out_parts[source].copy_(result.reshape(-1).view(torch.uint8))
        return outputs


@dataclass(frozen=True)
class _Arrivals:
    """What one source sends in a round: for the layer that it is in, rows per local expert."""

    layer: LayerExchange | None
    counts: list[int]
    num_bytes: int


def _layers_of(arrivals: list[_Arrivals]) -> list[LayerExchange]:
    """Each layer that some source is in, once; every rank sees them in the same order."""
    return list({arrival.layer.number: arrival.layer for arrival in arrivals if arrival.layer}.values())


def _run_by_expert(experts: Experts, rows: list[Tensor], counts: list[list[int]]) -> tuple[Tensor, ...]:
    """Run every expert once on its rows of all sources.

    rows: per source (n, D) in expert order; counts: per source H rows per expert -> per source its outputs (n, D).
    """
    if len(rows) == 1:
        return (experts(rows[0], counts[0]),)
    lengths = torch.tensor(counts)  # (sources, H)
    starts = (lengths.view(-1).cumsum(0) - lengths.view(-1)).view_as(lengths)
    by_expert, starts = lengths.t().reshape(-1), starts.t().reshape(-1)
    shift = starts - (by_expert.cumsum(0) - by_expert)
    joined = torch.cat(rows)
    order = torch.repeat_interleave(shift, by_expert) + torch.arange(joined.size(0))
    order = order.to(joined.device)
    outputs = experts(joined.index_select(0, order), lengths.sum(0).tolist())
    return torch.empty_like(outputs).index_copy_(0, order, outputs).split(lengths.sum(1).tolist())


def _split(counts: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(counts[start : start + size])
        start += size
    return parts


def _as_values(part: Tensor, dtype: torch.dtype) -> Tensor:
    """part (bytes,) as numbers; a copy where it begins, behind another layer's rows, at no place of one."""
    return (part if part.storage_offset() % dtype.itemsize == 0 else part.clone()).view(dtype)


def _row_bytes(rows: Tensor) -> int:
    return rows.size(-1) * rows.element_size()
