"""The ranks that serve together: a process group of their own, beside any other that their processes are in.

It is never torch.distributed's default group, which is the program's own: neither replaced nor ended by what is served.
Legend: R = ranks (the world size).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.forks import never_free, tell_of_forks

TIMEOUT = timedelta(minutes=30)  # a rank may load or compute so long before the others give it up
GRACE = 8.0  # seconds in which a living rank answers that it lives
WORD = 10_000  # characters of what a rank leaves word of


class RankGroup:
    """One rank's end of R; `store` is the group's alone.

    Tensors travel between CPUs, or between GPUs where `cuda` says so; messages always between CPUs.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, cuda: bool = False):
        self.rank, self.world_size = rank, world_size
        self._store, self._process = store, os.getpid()
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world_size, timeout=TIMEOUT)
        self._backends = {"cpu": gloo}
        if cuda:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._backends["cuda"] = dist.ProcessGroupNCCL(
                dist.PrefixStore("nccl", store), rank, world_size, options
            )
        tell_of_forks(self)

    @property
    def is_forked(self) -> bool:
        """Whether this process is a forked child of the rank, and the group its parent's."""
        return self._process != os.getpid()

    def after_fork(self) -> None:
        """In a forked child: whoever freed the copies of store and backends would wait for threads that it has not."""
        for each in (self._store, *self._backends.values()):
            never_free(each)

    @property
    def backends(self) -> str:
        """By name, for people."""
        return " and ".join(backend.name() for backend in self._backends.values())

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: Sequence[int] = (),
        sent_sizes: Sequence[int] = (),
    ) -> dist.Work:
        """Begin to send every rank its part of `sent`, which is grouped by ranks; sizes: of the parts, else equal."""
        return self._backend(sent).alltoall_base(received, sent, list(received_sizes), list(sent_sizes))

    def send(self, tensor: Tensor, rank: int) -> dist.Work:
        """Begin to send `tensor` to `rank`."""
        return self._backend(tensor).send([tensor], rank, 0)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Wait for what `rank` sends."""
        self._backend(tensor).recv([tensor], rank, 0).wait()

    def gather(self, content: bytes) -> list[bytes]:
        """Every rank's `content`, by rank, on every rank; ExchangeError where one cannot be reached."""
        with self.naming_the_fault():
            sizes = torch.empty(self.world_size, dtype=torch.int64)
            self.all_to_all(sizes, torch.full_like(sizes, len(content))).wait()
            received = bytearray(int(sizes.sum()))
            sent = bytearray(content * self.world_size)
            both = [torch.frombuffer(each, dtype=torch.uint8) if each else _EMPTY for each in (received, sent)]
            self.all_to_all(*both, sizes.tolist(), [len(content)] * self.world_size).wait()
        ends = sizes.cumsum(0).tolist()
        return [bytes(received[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]

    def leave_word(self, fault: str) -> None:
        """For the other ranks, of why this one breaks off."""
        with suppress(RuntimeError):  # the store may have gone with the rank that keeps it
            # the store ends over values of 8 MiB
            self._store.set(f"fault/{self.rank}", fault[:WORD].encode(errors="replace"))

    def word_left(self) -> str | None:
        """Of the first rank that has left one."""
        with suppress(RuntimeError):
            for rank in range(self.world_size):
                if self._store.check([f"fault/{rank}"]):
                    return self._store.get(f"fault/{rank}").decode()
        return None

    @contextmanager
    def naming_the_fault(self) -> Iterator[None]:
        """What torch.distributed raises becomes an ExchangeError, by the word of the rank that broke off."""
        try:
            yield
        except RuntimeError as error:
            fault = self.word_left()
            raise ExchangeError(f"the exchange between the ranks broke off: {fault or error}", fault) from error

    def cut_off(self) -> list[int]:
        """The ranks whose connection to this one has ended, after one of this group's calls has failed."""
        found = []
        for rank in range(self.world_size):
            if rank != self.rank:
                try:
                    self.send(torch.zeros(1), rank)  # which nobody receives
                except RuntimeError:
                    found.append(rank)
        return found

    def vanished(self) -> list[int]:
        """The ranks that do not answer; they may have ended because of an error that they told of."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            self._store.set(f"alive/{self.rank}", b"1")
            deadline = time.monotonic() + GRACE
            while others and time.monotonic() < deadline:
                others = [rank for rank in others if not self._store.check([f"alive/{rank}"])]
                time.sleep(0.1)
        except RuntimeError:  # the store went with rank 0, or with the launcher
            return [0] if self.rank > 0 else []
        return others

    def end(self) -> None:
        """Close the connections, once messages that are under way have arrived: whoever waits for this rank learns."""
        nccl = self._backends.pop("cuda", None)
        if nccl is not None:
            nccl.abort()
        self._backends.clear()

    def forget_store(self) -> None:
        """After the end, where the store is this process's alone.

        A store has a thread, for which whoever frees it waits: a forked child, which has none, would hang.
        """
        self._store = dist.HashStore()

    def _backend(self, tensor: Tensor) -> dist.ProcessGroup:
        backend = self._backends.get(tensor.device.type)
        if backend is None:
            raise RuntimeError("the group of ranks has ended")
        return backend


_EMPTY = torch.empty(0, dtype=torch.uint8)


def start_group(cuda: bool = False) -> RankGroup:
    """A group of the default group's ranks, where this process is in one, else of torchrun's; all of them call this.

    They wait for each other. ValueError where neither has what a group needs.
    """
    if dist.is_initialized():
        store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        store, rank, world_size = _meeting_point()
    number = store.add(f"moe_groups/{rank}", 1)  # the same on every rank, which start their groups in one order
    return RankGroup(dist.PrefixStore(f"moe_group/{number}", store), rank, world_size, cuda)


@functools.cache  # no group: where rank 0 keeps the store itself, the others could meet one that is about to go
def _meeting_point() -> tuple[dist.Store, int, int]:
    store, rank, world_size = next(dist.rendezvous("env://"))
    store.set_timeout(TIMEOUT)
    return store, rank, world_size
