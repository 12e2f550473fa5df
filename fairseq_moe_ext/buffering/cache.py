"""A layer's experts of which N are in fast memory; the others wait in a store.

Legend: E = experts of the layer, H = local experts, N = experts that the buffer keeps, R = rows in expert order,
D = model dim, F = hidden dim.

Slots are of a pool, which layers share (slot_pool.py); a call's copies and steps are in call.py. Source: "Toward
Efficient Inference for Mixture of Experts", section on expert buffering.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import wait
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.buffering.ahead import Ahead
from fairseq_moe_ext.buffering.call import Call
from fairseq_moe_ext.buffering.eviction import IN_TURN, Buffer
from fairseq_moe_ext.buffering.habits import Habits
from fairseq_moe_ext.buffering.host_tier import HostTier
from fairseq_moe_ext.buffering.slot_pool import SlotPool
from fairseq_moe_ext.buffering.store import ExpertStore
from fairseq_moe_ext.experts.buffer_call import BufferCall
from fairseq_moe_ext.experts.called_by_counts import CalledByCounts
from fairseq_moe_ext.experts.formats import Float, Format
from fairseq_moe_ext.experts.gradients import without_gradients
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.autocast import autocast_dtype
from fairseq_moe_ext.kernels.offsets import Offsets

# (H experts' packed parts, the dtype of their slots) -> the store
MakeStore = Callable[[list[list[Tensor]], torch.dtype], ExpertStore]


class BufferedExperts(CalledByCounts):
    """Stands in for ResidentExperts in serving: the same results bit by bit, state-dict keys and calls.

    Weights come by `load_state_dict`, which hands them to `make_store`; `start` makes the slots, packed as
    ResidentExperts are, once the model has its device and dtype. A started model may go to another dtype or device at
    any time between two calls, also between a call and its announcement.

    policy, order: eviction.py. kernel: as of ResidentExperts. local: the numbers of the experts that lie here, rising;
    None: all. form: how experts lie in slots and store; None: as floats.
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        activation: Activation = F.relu,
        *,
        make_store: MakeStore,
        policy: str,
        order: str,
        local: Sequence[int] | None = None,
        kernel: str = "auto",
        form: Format | None = None,
    ):
        super().__init__(num_experts, form or Float(model_dim, hidden_dim), activation, local, kernel)
        self._make_store = make_store
        self._policy, self._order = policy, order
        self._store: ExpertStore | None = None
        self._source: ExpertStore | None = None  # what slots are filled from: the store, or main memory before it
        self._host_capacity: int | None = None
        self.pool: SlotPool | None = None  # None until the start
        self._call: Call | None = None  # between announcement and call
        self._following: tuple[BufferedExperts, ...] = ()
        self.last_call = BufferCall()
        # follows the model's dtype and device, which the slots take
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, which rows must have."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the buffer's slots lie, and rows must come from."""
        return self._like.device

    @property
    def resident_bytes(self) -> int:
        """Of its slots; of all layers of a pool together, the pool's."""
        return 0 if self.pool is None else self.pool.bytes_of(self._seat)

    @property
    def resident_experts(self) -> list[int]:
        """The numbers of the experts in the buffer."""
        return [self.local[index] for index in self._buffer.resident]

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and on the device that slots are to have."""
        return self._like

    @property
    def readers(self) -> int:
        """How many copies out of its store may run at a time."""
        return getattr(self._store, "readers", 1)

    @property
    def is_started(self) -> bool:
        """Whether it has what its copies need, as from the first call on."""
        return self.pool is not None

    def start(
        self,
        size: int,
        ranking: Sequence[int] | None = None,
        host_capacity: int | None = None,
        pool: SlotPool | None = None,
        key: Hashable = None,
    ) -> None:
        """Keep `size` experts from here on, at most H, and fetch the first; another start begins anew.

        ranking: experts' numbers, the most important first: who is resident at the start, and who stays among equals;
        default: by rising number, and no such choice.
        host_capacity: how many experts lie in main memory between the store and slots on a GPU; None: none.
        pool, key: the pool and the layer's seat in it; None: a pool of its own.
        """
        if self._store is None:
            raise RuntimeError("experts in a buffer have no weights before load_state_dict")
        if not 1 <= size <= len(self.local):
            raise ValueError(f"the buffer's size must be from 1 to the {len(self.local)} experts, got {size}")
        self.stop()
        index = {expert: number for number, expert in enumerate(self.local)}
        ranked = [index[expert] for expert in (self.local if ranking is None else ranking) if expert in index]
        self._host_capacity, self._ranking = host_capacity, () if ranking is None else ranked
        self.pool = pool or SlotPool(self.format, {key: (size, len(self.local))}, self._like, self.readers)
        self._seat = self.pool.seat(key)
        self._ahead, self._habits = Ahead(self.pool), Habits(len(self.local))
        self._connect()
        self._empty()
        self._buffer = Buffer(size, self._policy, self._order, ranked[:size], self._ranking)
        self._slot_of = {expert: self.pool.take(self._seat) for expert in self._buffer.resident}
        self._fill()

    def precede(self, *following: BufferedExperts) -> None:
        """While this layer is called, those of its pool that are called next begin to fetch what they will want."""
        self._following = following

    def look_ahead(self) -> None:
        """Begin to fetch experts that the next call will want, where there are slots for it."""
        if self.pool is not None and self._call is None and self._filled == self.pool.version:
            likely = (expert for expert in self._habits.likely() if expert not in self._slot_of)
            self._ahead.begin(likely, self._source.load)

    def _look_ahead_of_following(self) -> None:
        for layer in self._following:
            layer.look_ahead()

    def stop(self) -> None:
        """No copy is under way from here on, and its slots are let go."""
        if self.pool is not None:
            self._empty()
            self.totals = self.totals + self._in_vain()
            self.pool.leave(self._seat)
            self.pool = self._ahead = None  # which refers to the pool

    def input_dtype(self, tokens: Tensor) -> torch.dtype:
        """In which `tokens` must come: under autocast in the experts' own dtype, for a buffer computes in no other."""
        return tokens.dtype if autocast_dtype(tokens) is None else self.dtype

    def prefetch(self, rows_per_expert: Sequence[int]) -> None:
        """The H counts of the next call: the copies of its misses start."""
        if self.pool is None:
            raise RuntimeError("experts in a buffer must be started before they are called")
        self._follow()
        if self._call is not None:  # a call that never came
            self._empty()
        counts = list(rows_per_expert)
        accesses = self._buffer.run(expert for expert, count in enumerate(counts) if count > 0)
        if self.pool.ahead.size:
            self._habits.add(counts)
        idle = self._look_ahead_of_following if self._following else None
        pooled = self._slot_of, self.pool, self._seat
        in_turn = self._order in IN_TURN
        self._call = Call(counts, accesses, *pooled, self._source.load, in_turn, self._ahead, idle)

    def compute(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        """As `CalledByCounts` has it."""
        return without_gradients("experts in a buffer", self._run(rows, offsets, row_ids), rows)

    @torch.no_grad()
    def _run(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        if self.training:
            raise RuntimeError("experts in a buffer cannot be trained: call eval() first")
        counts = offsets.counts
        if self._call is None:
            self.prefetch(counts)
        prefetched = self._call.counts
        if prefetched != counts:
            self._empty()
            raise ValueError(f"offsets must be of the counts that were prefetched, {prefetched}, got {counts}")
        try:
            self._follow()
            outputs = self._run_steps(self._call.steps(counts), rows, offsets, self.pool.packed(), row_ids)
        except BaseException:
            self._empty()  # some slots are half filled
            raise
        self.last_call = self._account(self._call)
        self.totals = self.totals + self.last_call
        self._call = None
        return outputs

    def _account(self, call: Call) -> BufferCall:
        if not call.read and not self.pool.ahead.size:  # as nearly always where the working set fits
            return BufferCall(hits=call.hits)
        disk_reads = sum(count > 0 for count in call.read)
        misses = len(call.read)
        return self._in_vain() + BufferCall(
            hits=call.hits,
            misses=misses,
            bytes_copied=misses * self.expert_bytes,
            host_reads=misses - disk_reads,
            disk_reads=disk_reads,
            bytes_read=sum(call.read),
            prefetched=call.prefetched,
            seconds=call.waited,
        )

    def _in_vain(self) -> BufferCall:
        """Copies ahead since the last time for which no call came."""
        in_vain, bytes_read = self._ahead.take_in_vain()
        return BufferCall(
            bytes_copied=in_vain * self.expert_bytes, bytes_read=bytes_read, prefetched_in_vain=in_vain
        )

    def _empty(self) -> None:
        """Nobody is resident from here on, and no copy under way."""
        if self.pool is None:  # a copy failed after a move, which has stopped all
            return
        if self._call is not None:
            self._call.settle()
        self._call = None
        self._ahead.settle()
        self.pool.clear(self._seat)
        self._buffer = Buffer(self._seat.size, self._policy, self._order, ranking=self._ranking)
        self._slot_of: dict[int, int] = {}

    def _connect(self) -> None:
        """The source of copies is one for slots that lie where they lie now."""
        on_cpu = self.device.type == "cpu"
        tiers = not on_cpu and self._host_capacity is not None
        self._source = HostTier(self._store, self._host_capacity) if tiers else self._store
        self._source.prepare(self.device)
        self._filled = self.pool.version

    def _follow(self) -> None:
        """The slots may have gone to other memory, which has nobody's weights."""
        if self._filled != self.pool.version:
            self._ahead.settle()
            self._connect()
            self._fill()
            if self._call is not None:
                self._call.copy_again(self._source.load)

    def _fill(self) -> None:
        """Every expert that has a slot is fetched into it."""
        source = self._source
        copies = [
            self.pool.copy(slot, partial(source.load, expert)) for expert, slot in self._slot_of.items()
        ]
        try:
            for copy in copies:
                self.pool.finish(copy)
        except BaseException:
            wait(copies)
            self.stop()  # some slots are half filled
            raise

    def _apply(self, fn, recurse=True):
        dtype = self.format.dtype(self.dtype)
        if self._call is not None:
            self._call.settle()
        if self.pool is not None:
            self._ahead.settle()
        try:
            super()._apply(fn, recurse)
        except BaseException:
            self.stop()
            raise
        new_dtype = self.format.dtype(self.dtype)
        if self._store is not None and new_dtype != dtype:
            self._store.convert(new_dtype)
        if self.pool is not None:
            self._follow()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._store is None:
            raise RuntimeError("experts in a buffer have no weights before load_state_dict")
        shapes, dtype = self.format.shapes(1).values(), self.format.dtype(self.dtype)
        for index, expert in enumerate(self.local):
            parts = [self._like.new_empty(shape[1:], dtype=dtype) for shape in shapes]
            self._store.load(index, parts)
            for key, part in zip(EXPERT_KEYS.values(), self.format.unpack(parts), strict=True):
                destination[f"{prefix}{expert}.{key}"] = part

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        lists = missing_keys, unexpected_keys, error_msgs
        weights = self._keys.of_every_expert(state_dict, prefix, strict, *lists)
        if weights is not None:
            names = [f"{prefix}{expert}." for expert in self.local]
            packed = [self.format.pack(parts, name) for parts, name in zip(weights, names, strict=True)]
            store = self._make_store(packed, self.format.dtype(self.dtype))
            self.stop()  # the slots hold other weights: start again
            self._store = self._source = store
