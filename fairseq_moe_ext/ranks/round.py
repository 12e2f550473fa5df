"""One round of the exchange on one rank: what every rank tells the others, the rows that travel, and their outputs.

Legend: R = ranks, P = replicas of a layer's experts over all ranks, H = local experts, D = model dim, C = slots per
expert.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq_moe_ext.gating.call import Experts
from fairseq_moe_ext.ranks.faults import interruption

if TYPE_CHECKING:
    from fairseq_moe_ext.ranks.exchange import Exchange, LayerExchange

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
        exchange.under_way = self
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
        """The largest of all ranks' capacities, in slots per expert."""
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
        self._work = self._exchange.under_way = None

    def _arrivals_from(self, source: int) -> Arrivals:
        message = self.messages[source]
        if message.layer == IDLE:
            return Arrivals(None, [], 0)
        layer = self._exchange.layers[message.layer]
        counts = layer.counts_from(source, message, self.largest_capacity)
        return Arrivals(layer, counts, sum(counts) * layer.experts.model_dim * layer.experts.dtype.itemsize)

    def _prefetch(self, arrivals: list[Arrivals]) -> None:
        """Tell the experts what is to come, so that those in a buffer are fetched while the tokens travel."""
        for layer in _layers_of(arrivals):
            counts = [arrival.counts for arrival in arrivals if arrival.layer is layer]
            totals = [sum(column) for column in zip(*counts, strict=True)]
            if any(totals):
                layer.experts.prefetch(totals)

    def _compute(self, arrived: Tensor, arrivals: list[Arrivals]) -> Tensor:
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
class Arrivals:
    """What one source sends in a round: for the layer that it is in, rows per local expert."""

    layer: LayerExchange | None
    counts: list[int]
    num_bytes: int


def _layers_of(arrivals: list[Arrivals]) -> list[LayerExchange]:
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


def _as_values(part: Tensor, dtype: torch.dtype) -> Tensor:
    """part (bytes,) as numbers; a copy where it begins, behind another layer's rows, at no place of one."""
    return (part if part.storage_offset() % dtype.itemsize == 0 else part.clone()).view(dtype)
