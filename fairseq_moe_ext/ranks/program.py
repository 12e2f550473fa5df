"""Several ranks whose own programs serve one model: every call is made by all of them, and all get its results.

A call's batches are dealt out as the commands deal them: batch i belongs to rank i % R. Nothing of it changes the
program: no signal handler, no hook, no end of a process, no default group. After an error that leaves the ranks out of
step the model can only be closed.
Legend: R = ranks (the world size).
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fairseq_moe_ext.ranks.calls import Call, OneCall
from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.group import world_size
from fairseq_moe_ext.ranks.messages import Outbox, receive
from fairseq_moe_ext.ranks.process_group import RankGroup, start_group

logger = logging.getLogger("fairseq_moe_ext")


def ranks_of_program(cpu: bool) -> ProgramRanks | OneProcess:
    """This process's ranks: those of torch.distributed's default group, else torchrun's; all of them call this.

    cpu: whether they compute on CPUs, whatever is there.
    """
    alone = dist.get_world_size() == 1 if dist.is_initialized() else world_size() == 1
    if alone:
        return OneProcess()
    return ProgramRanks(start_group(torch.cuda.is_available() and not cpu), cpu)


class OneProcess:
    """One process serves: its calls are its own."""

    members = None
    world_size = 1

    def check_alone(self, name: str) -> None:
        """Only several ranks refuse."""

    @contextmanager
    def call(self, name: str, arguments: Mapping[str, Any]) -> Iterator[OneCall]:
        """Around one call; the arguments need not be compared with anybody's."""
        yield OneCall()

    def end(self, write: Callable[[], None] | None = None, in_step: bool = False) -> None:
        """Call `write`, where there is something to be written."""
        if write is not None:
            write()


class ProgramRanks:
    """One rank among R, whose programs serve a model together."""

    shows_all = False  # its own batches alone come to a rank

    def __init__(self, group: RankGroup, cpu: bool):
        self.rank, self.world_size = group.rank, group.world_size
        self.exchange = Exchange(group)
        self._group, self._outbox = group, Outbox(group)
        try:
            hosts = group.gather(socket.gethostname().encode())
            self.local_ranks = hosts.count(hosts[self.rank])
            _check_devices(group.gather(_device(cpu).encode()))
        except BaseException:
            group.end()
            raise

    @property
    def members(self) -> ProgramRanks:
        """What the task of the model is told."""
        return self

    def check_alone(self, name: str) -> None:
        """ValueError: `name` is for one process."""
        raise ValueError(f"{name} must be called where one process serves, got {self.world_size} ranks")

    @contextmanager
    def call(self, name: str, arguments: Mapping[str, Any]) -> Iterator[Call]:
        """Around one call, which all ranks make; an error that leaves them out of step ends the group.

        ExchangeError where another rank failed or cannot be reached, also in an earlier call, and in a forked child.
        """
        self._check_usable(name)
        call = Call(self, name, arguments)
        try:
            yield call
        except ExchangeError as error:
            if call.in_step:
                raise
            raise self._out_of_reach(name, error) from error
        except BaseException as error:
            if not call.in_step:
                self._break_off(error)
            raise

    def rank_batch(self, position: int, of_all: bool) -> OwnBatch:
        """The turn of the batch at `position` among all batches, or among this rank's own."""
        number = position if of_all else position * self.world_size + self.rank
        return OwnBatch(number, number % self.world_size == self.rank)

    def drain(self, batches: int = 0, last: bool = True) -> None:
        """Compute for the others until every rank is done with its own batches; every call begins anew."""
        while self.exchange.idle_round(alive=False):
            pass

    @property
    def part(self) -> int:
        """Which of R parts of a call's batches is this rank's: those at part, part + R, ..."""
        return self.rank

    def leave(self) -> None:
        """The program goes on."""

    def gather(self, content: Any) -> list[Any]:
        """Every rank's `content`, of plain data, by rank."""
        return [json.loads(each) for each in self._group.gather(json.dumps(content).encode())]

    def send(self, content: bytes) -> None:
        """Send to rank 0, which receives in this order."""
        self._outbox.send(content)

    def receive(self, rank: int) -> bytearray:
        """What `rank` sends next."""
        return receive(self._group, rank)

    def end(self, write: Callable[[], None] | None = None, in_step: bool = False) -> None:
        """Give the group back; write: what all ranks do together before, where there is something to be written.

        in_step: all ranks do it now; else nothing is written. In a forked child nothing ends: its parent goes on.
        """
        if not self._group.is_forked:
            self._end(write, in_step)

    def _check_usable(self, name: str) -> None:
        if self._group.is_forked:
            raise ExchangeError(f"{name}() must be called in the process that loaded the model, got its forked child")
        if self.exchange.fault is not None:
            raise ExchangeError(f"the model can only be closed: {self.exchange.fault}", self.exchange.fault)

    def _end(self, write: Callable[[], None] | None, in_step: bool) -> None:
        try:
            if write is not None:
                self._write(write, in_step)
        finally:
            if self.exchange.fault is None:
                self.exchange.fault = f"rank {self.rank} of {self.world_size} has closed the model"
                self._group.leave_word(self.exchange.fault)
            self._end_group()

    def _write(self, write: Callable[[], None], in_step: bool) -> None:
        try:
            if not in_step:
                raise ExchangeError("close() must be called on every rank, and was not")
            with self.call("close", {}) as call:
                with call.preparing():
                    pass
                write()
                self._outbox.wait()
        except (ExchangeError, ValueError) as error:
            logger.error("report and trace of all ranks are not written: %s", error)

    def _break_off(self, error: BaseException) -> None:
        """This rank cannot go on: the others learn why."""
        if self.exchange.fault is None:
            self.exchange.tell(error)
        self._end_group()

    def _out_of_reach(self, name: str, error: ExchangeError) -> ExchangeError:
        """Another rank failed or has gone: by its own word, or found by its connection."""
        reason = error.fault
        if reason is None:
            lost = self._group.cut_off() or self._group.vanished()
            named = ", ".join(map(str, lost))
            reason = f"rank {named} of {self.world_size} vanished" if lost else str(error)
            reason = self._group.word_left() or reason  # which may have come later than the end of the connection
        self.exchange.fault = reason
        self._group.leave_word(reason)
        self._end_group()
        return ExchangeError(f"{name}() broke off: {reason}", reason)

    def _end_group(self) -> None:
        self.exchange.abandon()
        self._outbox.clear()
        self._group.end()


class OwnBatch:
    """One batch, whose owner computes it and keeps the result until all share theirs."""

    def __init__(self, number: int, is_ours: bool):
        self.number, self.is_ours = number, is_ours

    def result(self, compute, nbest: int | None = None) -> list[list[dict]]:
        """The hypotheses, computed here; `nbest` is for batches that travel."""
        return compute()


def _device(cpu: bool) -> str:
    """Where this rank computes, by a name that no other device has."""
    if cpu or not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} {properties.uuid}"


def _check_devices(devices: list[bytes]) -> None:
    on_gpu = [bool(device) for device in devices]
    if any(on_gpu) != all(on_gpu):
        raise ValueError(f"all ranks must compute on GPUs, or none (cpu=True), got rank {on_gpu.index(False)} without")
    if all(on_gpu) and len(set(devices)) < len(devices):
        shared = next(device for device in devices if devices.count(device) > 1)
        ranks = ", ".join(str(rank) for rank, device in enumerate(devices) if device == shared)
        raise ValueError(
            f"every rank must have a GPU of its own (torch.cuda.set_device), got {shared.decode()} for ranks {ranks}"
        )
