"""The slots of all layers of one format: who may hold how many, and the copies into them.

Source: "Toward Efficient Inference for Mixture of Experts", section on expert buffering, has them layer by layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from fairseq_moe_ext.buffering.copy_lane import CopyLane
from fairseq_moe_ext.experts.formats import Format
from fairseq_moe_ext.kernels.grouped_mlp import Pool

STAGING_SLOTS = 4  # for all layers together: as many experts are on their way at a time, enough to keep a disk busy

AHEAD_SHARE = 8  # a slot for a copy ahead for so many experts that are kept


class HasQueue(Protocol):
    """One layer's copies ahead (ahead.py)."""

    def drop_queued(self) -> None:
        """Of the copies that were begun only those stay that are under way or done."""


@dataclass(eq=False)
class Seat:
    """One layer's share of a pool. size: how many slots it may always hold; held: those that it does; left: whether it
    needs none any more."""

    size: int
    held: set[int] = field(default_factory=set)
    left: bool = False


class SlotPool(nn.Module):
    """S slots, of which a layer may always hold as many as it keeps experts; those beyond are lent to who asks first.

    So an expert on its way has a place while the ones that it pushes out still compute, and no layer can be kept from
    going on by another that was announced and not called.

    kept: per layer, by any key, how many experts its buffer keeps and how many it has. like: whose dtype and device the
    slots take; a module like any other, they go where the model goes. readers: how many copies run at a time. ahead: so
    many slots more are for copies before their call (ahead.py).
    """

    def __init__(
        self, form: Format, kept: Mapping[Hashable, tuple[int, int]], like: Tensor, readers: int = 1, ahead: int = 0
    ):
        super().__init__()
        self._form, self._readers = form, readers
        self._staging = staging_slots(kept.values())
        self.ahead = Seat(ahead)  # of all layers' copies ahead, which are lent nothing
        self.aheads: weakref.WeakSet[HasQueue] = weakref.WeakSet()  # of all layers
        self._seats = {key: Seat(size) for key, (size, _) in kept.items()}
        self.num_slots = sum(size for size, _ in kept.values()) + self._staging + ahead
        self._free = list(range(self.num_slots))[::-1]
        for name, shape in form.shapes(self.num_slots).items():
            self.register_buffer(name, like.new_empty(shape, dtype=form.dtype(like.dtype)), persistent=False)
        self.version = 0  # other after each change of memory, which then holds nobody's weights
        self._lanes: list[CopyLane] = self._new_lanes()  # of needed copies, and of those ahead; none when all have left

    def tensors(self) -> list[Tensor]:
        """In the order of an expert's packed parts, each with S first."""
        return list(self._buffers.values())

    def packed(self) -> Pool:
        """As kernels take it."""
        return self._form.pool(self.tensors())

    def seat(self, key: Hashable) -> Seat:
        """Of the layer with that key."""
        return self._seats[key]

    def slot_bytes(self) -> int:
        """Of one slot."""
        return sum(tensor[:1].nbytes for tensor in self.tensors())

    def bytes_of(self, seat: Seat) -> int:
        """Of a layer's own slots; the shared ones count with the first layer's, so that all layers have the whole."""
        shared = self._staging + self.ahead.size if seat is next(iter(self._seats.values())) else 0
        return (seat.size + shared) * self.slot_bytes()

    def leave(self, seat: Seat) -> None:
        """Its layer needs no slots any more; with the last one's the copying threads end."""
        seat.left = True
        if all(each.left for each in self._seats.values()):
            self._close_lanes()

    def room(self, seat: Seat) -> int:
        """How many slots its layer may take: what is left of its own, and of the lent ones."""
        if seat is self.ahead:
            return seat.size - len(seat.held)
        lent = sum(max(0, len(each.held) - each.size) for each in self._seats.values())
        return max(0, seat.size - len(seat.held)) + self._staging - lent

    def take(self, seat: Seat) -> int:
        """A slot, where there is room."""
        slot = self._free.pop()
        seat.held.add(slot)
        return slot

    def give(self, seat: Seat, slot: int) -> None:
        """Back, by the layer that holds it."""
        seat.held.remove(slot)
        self._free.append(slot)

    def hand_over(self, slot: int, seat: Seat, other: Seat) -> None:
        """From one seat to another one, where there is room."""
        seat.held.remove(slot)
        other.held.add(slot)

    def clear(self, seat: Seat) -> None:
        """All that its layer holds are given back."""
        for slot in sorted(seat.held, reverse=True):
            self.give(seat, slot)

    def copy(self, slot: int, load: Callable[[list[Tensor]], int]) -> Future:
        """`load` fills the parts of `slot`, in its turn, and gives the bytes read from disk."""
        return self._copy(self._lanes[0], slot, load)

    def hold_ahead(self) -> None:
        """Needed copies are to begin: of those ahead the one that is under way goes on, no other begins."""
        for ahead in list(self.aheads):
            ahead.drop_queued()

    def copy_ahead(self, slot: int, load: Callable[[list[Tensor]], int]) -> Future:
        """As `copy`, beside all copies that are needed: one at a time, so that none of these waits for more."""
        return self._copy(self._lanes[-1], slot, load)

    def _copy(self, lane: CopyLane, slot: int, load: Callable[[list[Tensor]], int]) -> Future:
        return lane.start(lambda: load([slots[slot] for slots in self.tensors()]))

    @property
    def is_busy(self) -> bool:
        """Whether needed copies are under way or to come, of any layer."""
        return self._lanes[0].is_busy

    def finish(self, copy: Future) -> int:
        """As `CopyLane.finish`, of any copy."""
        return self._lanes[0].finish(copy)

    def _new_lanes(self) -> list[CopyLane]:
        tensors = self.tensors()
        lanes = [CopyLane(tensors[0].device, tensors, self._readers)]
        if self.ahead.size:
            lanes.append(CopyLane(tensors[0].device, tensors, lands=True))
        return lanes

    def _close_lanes(self) -> None:
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.close()

    def _apply(self, fn, recurse=True):
        before = self._addresses()
        for lane in self._lanes:
            lane.wait()
        try:
            super()._apply(fn, recurse)
        finally:  # it may have failed half way
            if self._addresses() != before:  # other memory, which `fn` need not have filled
                self.version += 1
                if self._lanes:
                    self._close_lanes()
                    self._lanes = self._new_lanes()
        return self

    def _addresses(self) -> list[tuple]:
        return [(slots.data_ptr(), slots.device, slots.dtype) for slots in self.tensors()]

    def __del__(self):
        for lane in getattr(self, "_lanes", ()):  # before the memory that they copy between
            lane.close(wait=False)  # a thread cannot wait for itself, nor for others within a garbage collection


def staging_slots(kept: Iterable[tuple[int, int]]) -> int:
    """Of a pool whose layers keep and have so many experts, pairs: none where everything is kept."""
    return min(STAGING_SLOTS, sum(total - size for size, total in kept))


def ahead_slots(kept: Iterable[tuple[int, int]]) -> int:
    """Of a pool whose layers look ahead: none where everything is kept."""
    kept = list(kept)
    return min(max(1, sum(size for size, _ in kept) // AHEAD_SHARE), sum(total - size for size, total in kept))
