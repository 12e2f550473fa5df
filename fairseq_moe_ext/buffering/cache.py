"""A layer's experts of which N are in fast memory; the others wait in a store.

Legend: E = experts of the layer, H = local experts, N = experts that the buffer keeps, S = slots, R = rows in expert
order, D = model dim, F = hidden dim.

There are two slots more than that: an expert on its way lies in one of them while the experts that it will push out
still compute. Source: "Toward Efficient Inference for Mixture of Experts", section on expert buffering.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe_ext.buffering.copy_lane import CopyLane
from fairseq_moe_ext.buffering.eviction import Access, Buffer
from fairseq_moe_ext.buffering.host_tier import HostTier
from fairseq_moe_ext.buffering.store import ExpertStore
from fairseq_moe_ext.experts.buffer_call import BufferCall
from fairseq_moe_ext.experts.called_by_counts import CalledByCounts
from fairseq_moe_ext.experts.formats import Float, Format
from fairseq_moe_ext.experts.gradients import without_gradients
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.experts.schedule import Step
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.autocast import autocast_dtype
from fairseq_moe_ext.kernels.offsets import Offsets

STAGING_SLOTS = 2

# (H experts' packed parts, the dtype of their slots) -> the store
MakeStore = Callable[[list[list[Tensor]], torch.dtype], ExpertStore]


@dataclass
class _Batch:
    """One call under way. accesses: in the order to compute; copies: of the misses that were started, as (expert, slot,
    copy); to_start: the misses whose copies were not."""

    counts: list[int]
    accesses: list[Access]
    to_start: deque[int]
    copies: deque[tuple[int, int, Future]] = field(default_factory=deque)


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
        self._lane: CopyLane | None = None  # None until the start
        self._batch: _Batch | None = None  # between prefetch and call
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
        """Of the slots."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def resident_experts(self) -> list[int]:
        """The numbers of the experts in the buffer."""
        return [self.local[index] for index in self._buffer.resident]

    @property
    def is_started(self) -> bool:
        """Whether it has what its copies need, as from the first call on."""
        return self._lane is not None

    def start(self, size: int, ranking: Sequence[int] | None = None, host_capacity: int | None = None) -> None:
        """Make the slots of a buffer of `size` experts, at most H, and fill it; another start begins anew.

        ranking: experts' numbers; the first that are local are resident at the start; default: by rising number.
        host_capacity: how many experts lie in main memory between the store and slots on a GPU; None: none.
        """
        if self._store is None:
            raise RuntimeError("experts in a buffer have no weights before load_state_dict")
        if not 1 <= size <= len(self.local):
            raise ValueError(f"the buffer's size must be from 1 to the {len(self.local)} experts, got {size}")
        self.stop()
        self._slots = min(size + STAGING_SLOTS, len(self.local))
        dtype = self.format.dtype(self.dtype)
        for name, shape in self.format.shapes(self._slots).items():
            slots = self._like.new_empty(shape, dtype=dtype)
            self.register_parameter(name, nn.Parameter(slots, requires_grad=False))
        index = {expert: number for number, expert in enumerate(self.local)}
        ranked = [index[expert] for expert in (self.local if ranking is None else ranking) if expert in index]
        self._size, self._host_capacity = size, host_capacity
        self._empty()
        self._buffer = Buffer(size, self._policy, self._order, ranked[:size])
        self._slot_of = {expert: slot for slot, expert in enumerate(self._buffer.resident)}
        self._free = [slot for slot in self._free if slot not in self._slot_of.values()]
        self._connect()
        self._fill()

    def stop(self) -> None:
        """No copy is under way from here on and no thread left; the slots are let go."""
        self._disconnect()
        for name in self.format.shapes(1):
            self._parameters.pop(name, None)

    def input_dtype(self, tokens: Tensor) -> torch.dtype:
        """In which `tokens` must come: under autocast in the experts' own dtype, for a buffer computes in no other."""
        return tokens.dtype if autocast_dtype(tokens) is None else self.dtype

    def prefetch(self, rows_per_expert: Sequence[int]) -> None:
        """The H counts of the next call: the copies of its misses start."""
        if self._lane is None:
            raise RuntimeError("experts in a buffer must be started before they are called")
        if self._batch is not None:  # a call that never came
            self._empty()
        counts = list(rows_per_expert)
        accesses = self._buffer.run(expert for expert, count in enumerate(counts) if count > 0)
        self._batch = _Batch(counts, accesses, deque(access.expert for access in accesses if not access.hit))
        self._start_copies()

    def compute(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        """As `CalledByCounts` has it."""
        return without_gradients("experts in a buffer", self._run(rows, offsets, row_ids), rows)

    @torch.no_grad()
    def _run(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        if self.training:
            raise RuntimeError("experts in a buffer cannot be trained: call eval() first")
        counts = offsets.counts
        if self._batch is None:
            self.prefetch(counts)
        prefetched = self._batch.counts
        if prefetched != counts:
            self._empty()
            raise ValueError(f"offsets must be of the counts that were prefetched, {prefetched}, got {counts}")
        self._waited, self._read = 0.0, []
        try:
            pool = self.format.pool([slots.detach() for slots in self.parameters()])
            outputs = self._run_steps(self.steps(counts), rows, offsets, pool, row_ids)
        except BaseException:
            self._empty()  # some slots are half filled
            raise
        self.last_call = self._account(self._batch)
        self.totals = self.totals + self.last_call
        self._batch = None
        return outputs

    def steps(self, rows_per_expert: Sequence[int]) -> Iterator[Step]:
        """Of the call that was prefetched (a Schedule): hits that follow one another are a step, and every miss is one
        as it lands."""
        hits: dict[int, int] = {}  # expert -> slot
        for access in self._batch.accesses:
            if access.hit:
                hits[access.expert] = self._slot_of[access.expert]
                continue
            if hits:
                yield _together(hits)
                hits = {}
            yield Step(access.expert, access.expert + 1, [self._take_in(access)])
        if hits:
            yield _together(hits)

    def _take_in(self, access: Access) -> int:
        """The slot of a missed expert, once it is there; the one that it pushes out makes way for the next copy."""
        _, slot, copy = self._batch.copies.popleft()
        start = time.perf_counter()
        self._read.append(self._lane.finish(copy))
        self._waited += time.perf_counter() - start
        if access.evicted is not None:
            self._free.append(self._slot_of.pop(access.evicted))
        self._slot_of[access.expert] = slot
        self._start_copies()
        return slot

    def _start_copies(self) -> None:
        batch = self._batch
        while self._free and batch.to_start:
            slot, expert = self._free.pop(), batch.to_start.popleft()
            batch.copies.append((expert, slot, self._copy(expert, slot)))

    def _copy(self, expert: int, slot: int) -> Future:
        return self._lane.start(lambda: self._source.load(expert, self._parts(slot)))

    def _parts(self, slot: int) -> list[Tensor]:
        return [slots.detach()[slot] for slots in self._parameters.values()]

    def _account(self, batch: _Batch) -> BufferCall:
        disk_reads = sum(count > 0 for count in self._read)
        misses = len(self._read)
        return BufferCall(
            hits=len(batch.accesses) - misses,
            misses=misses,
            bytes_copied=misses * self.expert_bytes,
            host_reads=misses - disk_reads,
            disk_reads=disk_reads,
            bytes_read=sum(self._read),
            seconds=self._waited,
        )

    def _empty(self) -> None:
        """Nobody is resident from here on, and no copy under way."""
        if self._batch is not None:
            wait([copy for *_, copy in self._batch.copies])
        self._batch = None
        self._buffer = Buffer(self._size, self._policy, self._order)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(self._slots))

    def _connect(self) -> None:
        """Copies can be started, into the slots where they lie now."""
        on_cpu = self.device.type == "cpu"
        tiers = not on_cpu and self._host_capacity is not None
        self._source = HostTier(self._store, self._host_capacity) if tiers else self._store
        self._source.prepare(self.device)
        self._lane = CopyLane(self.device, self.parameters())

    def _disconnect(self) -> _Batch | None:
        """No copy is under way from here on, and none can be started; gives the batch that was."""
        batch, self._batch = self._batch, None
        if self._lane is not None:
            lane, self._lane = self._lane, None
            lane.close()
        return batch

    def _fill(self) -> None:
        """Every expert that lies in a slot, or was on its way to one, is fetched into it."""
        copies = [self._copy(expert, slot) for expert, slot in self._slot_of.items()]
        if self._batch is not None:
            for expert, slot, _ in tuple(self._batch.copies):
                self._batch.copies.popleft()
                self._batch.copies.append((expert, slot, self._copy(expert, slot)))
        try:
            for copy in copies:
                self._lane.finish(copy)
        except BaseException:
            self._disconnect()  # some slots are half filled
            raise

    def _apply(self, fn, recurse=True):
        was_started, batch = self.is_started, self._disconnect()
        dtype, addresses = self.format.dtype(self.dtype), self._addresses()
        super()._apply(fn, recurse)
        new_dtype = self.format.dtype(self.dtype)
        if self._store is not None and new_dtype != dtype:
            self._store.convert(new_dtype)
        if was_started:
            self._batch = batch
            self._connect()
            if self._addresses() != addresses:  # other memory, which `fn` need not have filled
                self._fill()
        return self

    def _addresses(self) -> list[tuple]:
        return [(slots.data_ptr(), slots.device, slots.dtype) for slots in self.parameters()]

    def __del__(self):
        if getattr(self, "_lane", None) is not None:  # before the memory that it copies between
            self._lane.close(wait=False)  # a thread cannot wait for itself, nor for others within a garbage collection

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


def _together(slot_of: dict[int, int]) -> Step:
    first, end = min(slot_of), max(slot_of) + 1
    return Step(first, end, [slot_of.get(expert, -1) for expert in range(first, end)])
