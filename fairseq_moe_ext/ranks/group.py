"""Several ranks that serve one model: the process group, each rank's share of the batches, and results on rank 0.

Batch i belongs to rank i % R; batches are counted over all data sets of a run. A rank works through its own batches
without waiting for the others' (ranks/exchange.py keeps the ranks in step), and hands its results to rank 0, which
prints all of them in the order of one rank.
Legend: R = ranks (the world size).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.messages import Outbox, pack, receive, unpack
from fairseq_moe_ext.ranks.process_group import RankGroup, start_group

logger = logging.getLogger("fairseq_moe_ext")

RANK_BATCH = "moe_rank_batch"  # the key under which a batch carries its RankBatch
GRACE_PERIOD = 2.0  # seconds for which the other ranks leave it to rank 0 to tell of an error


def world_size() -> int:
    """R, as torchrun's environment has it; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_ranks() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@dataclass(frozen=True)
class Rank:
    """Which one of how many a process is."""

    rank: int
    world_size: int

    @classmethod
    def of_command(cls) -> Rank:
        """As torchrun's environment has it."""
        return cls(int(os.environ.get("RANK", "0")), world_size())


@functools.cache  # fairseq may ask for its parser twice
def tell_errors_once(rank: int, size: int) -> None:
    """From here on errors that all ranks meet are told by rank 0 alone, any other by its rank."""
    hook = sys.excepthook

    def tell(kind, error, traceback):
        if rank > 0:
            time.sleep(GRACE_PERIOD)  # whoever starts the ranks ends them all when the first has ended
        sys.stderr = sys.__stderr__  # torch.distributed's own hook keeps what is written while it runs
        print(f"rank {rank} of {size} failed:", file=sys.stderr)
        hook(kind, error, traceback)
        sys.stderr.flush()
        os._exit(1)  # threads of the ranks' group may wait for each other

    sys.excepthook = tell


@functools.cache
def served_ranks() -> Ranks | None:
    """This process's ranks, which start with the first call; None where one process serves."""
    if world_size() == 1 or dist.is_initialized():  # a group that is there already is a training's
        return None
    return Ranks(start_group(torch.cuda.is_available()))


class Ranks:
    """One rank among R that serve one of fairseq's commands."""

    def __init__(self, group: RankGroup):
        self.rank, self.world_size = group.rank, group.world_size
        self.local_ranks = local_ranks()
        self.shows_all = self.rank == 0  # results of other ranks' batches, too
        self.exchange = Exchange(group)
        self._group = group
        self._outbox = Outbox(group)
        self.received = [0] * self.world_size  # batches of each rank, whose results are here
        self._before = 0  # batches of the data sets before this one
        self._drained = False
        self.last_words: Callable[[], None] = lambda: None  # of an interrupted rank 0 that cannot reach the others
        self._hook, sys.excepthook = sys.excepthook, self._tell_of
        logger.info("%d ranks serve, %s between them", self.world_size, group.backends)

    @property
    def part(self) -> int:
        """Which of R parts of the data set's batches is this rank's: those at part, part + R, ..."""
        return (self.rank - self._before) % self.world_size

    def rank_batch(self, position: int, of_all: bool) -> RankBatch:
        """The turn of the batch at `position` among all batches of a data set, or among this rank's own."""
        return RankBatch(self, self._before + (position if of_all else position * self.world_size + self.part))

    def drain(self, batches: int = 0, last: bool = True) -> None:
        """Compute for the others until every rank is done with its share of a data set's `batches`.

        last: no data set comes after this one.
        """
        while self.exchange.idle_round(alive=False):
            pass
        self._before += batches
        self._drained = last

    def interrupt(self, number: int) -> bool:
        """This process got signal `number`: whether it ends now, not with all other ranks in their next round."""
        if self._drained or not self.exchange.has_layers:
            return self.exchange.interrupted is None
        # torchrun sends its signals again, also to ranks that are about to end
        self.exchange.interrupt = self.exchange.interrupt or number
        return False

    def receive_rest(self) -> None:
        """Rank 0, after all broke off: take in the results that are on their way, which nobody prints any more."""
        for rank in range(1, self.world_size):
            for _ in range(self.exchange.heard_finished[rank] - self.received[rank]):
                with suppress(ExchangeError):
                    self.receive(rank)

    def end(self) -> None:
        """After all broke off: this rank's figures have arrived."""
        with suppress(ExchangeError):
            self._outbox.wait()
        self._group.end()

    def leave(self) -> None:
        """End this rank's process, if it is not rank 0's, which has its figures to print."""
        self._outbox.wait()
        self._group.end()
        if self.rank > 0:
            sys.stdout.flush()
            sys.exit(0)

    def send(self, content: bytes, batch: int | None = None) -> None:
        """Send to rank 0, which receives in this order; batch: the number of the batch whose result it is."""
        # rank 0 takes the batches in their order: it has all before the last that it has finished itself
        self._outbox.let_go(before=(self.exchange.heard_finished[0] - 1) * self.world_size)
        self._outbox.send(content, batch)

    def receive(self, rank: int) -> bytearray:
        """What `rank` sends next."""
        return receive(self._group, rank)

    def wait_for(self, owner: int, batches: int) -> None:
        """Compute for the others until rank `owner` has finished so many batches."""
        while self.exchange.heard_finished[owner] < batches and self.exchange.has_layers:
            self.exchange.idle_round(alive=True)

    def _tell_of(self, kind, error, traceback) -> None:
        """sys.excepthook: where the exchange broke off, name the rank that failed or vanished."""
        if isinstance(error, KeyboardInterrupt):  # report and trace are written when the process ends
            if self.exchange.fault is None:
                self.exchange.tell(error)
            if self.rank == 0:
                sys.__excepthook__(kind, error, traceback)
            return
        if not isinstance(error, ExchangeError):
            if self.exchange.fault is None:
                self.exchange.tell(error)
            self._hook(kind, error, traceback)
            return
        if error.fault is not None:
            time.sleep(2 * GRACE_PERIOD)  # the rank that failed tells more of it
            reason = error.fault
        else:
            lost = self._group.vanished()
            reason = f"rank {', '.join(map(str, lost))} of {self.world_size} vanished" if lost else str(error)
        print(f"rank {self.rank} of {self.world_size} ends: {reason}", file=sys.stderr, flush=True)
        if self.exchange.interrupt and self.rank == 0:
            self.last_words()
        os._exit(1)  # the group's threads would wait for ranks that are gone


class RankBatch:
    """One batch: whose it is, and how rank 0 comes by its result."""

    def __init__(self, ranks: Ranks, number: int):
        self.number = number
        self._ranks = ranks
        self._owner = number % ranks.world_size

    @property
    def is_ours(self) -> bool:
        """Whether this rank computes it."""
        return self._owner == self._ranks.rank

    def result(self, compute: Callable[[], list[list[dict]]], nbest: int | None = None) -> list[list[dict]]:
        """The batch's hypotheses: computed here, or, on rank 0, what their owner sends: the `nbest` first of each."""
        batches = self.number // self._ranks.world_size + 1
        if not self.is_ours:
            self._ranks.wait_for(self._owner, batches)
            result = self._ranks.receive(self._owner)
            self._ranks.received[self._owner] = batches
            return unpack(result)
        result = compute()
        if self._ranks.rank > 0:
            self._ranks.send(pack([sentence[:nbest] for sentence in result]), self.number)
        self._ranks.exchange.finished = batches
        return result
