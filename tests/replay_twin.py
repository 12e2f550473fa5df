"""replay.py's clock written once more from its description: one moment after another, every slot and read by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(eq=False)
class Slot:
    """layer, expert: whose. use: `kept`, or `prefetched`. latency, left: seconds and bytes until it is filled."""

    layer: str
    expert: int
    use: str
    phase: str
    latency: float = 0
    left: float = 0
    vain: bool = False

    @property
    def is_filled(self) -> bool:
        return self.latency == 0 and self.left == 0


class Twin:
    def __init__(self, calls, buffers, rates, prefetcher, staging, in_turn):
        self.calls, self.buffers, self.rates = calls, buffers, rates
        self.prefetcher, self.staging, self.in_turn = prefetcher, staging, in_turn
        self.time = 0
        self.slots = [
            Slot(name, expert, "kept", "") for name, buffer in buffers.items() for expert in buffer.resident
        ]
        self.queue: list[int] = []
        self.passing: list[int] = []  # missed experts that leave in the call
        self.guesses: list = []
        self.call = calls[0]
        self.reads: list[str] = []  # the phase of each
        self.vain: list[str] = []
        self.spent: list[tuple[str, float, float]] = []  # of every call: phase, seconds, waited

    def run(self):
        model = self.model()
        request = next(model)
        while True:
            self.start_reads()
            kind, wanted = request  # seconds to compute, or whose slot to wait for
            if kind == "compute" and wanted == 0 or kind == "wait" and any(self.filled(each) for each in wanted):
                try:
                    request = model.send(None)
                except StopIteration:
                    break
                continue
            step = self.time_to_next_event(wanted if kind == "compute" else None)
            self.let_pass(step)
            if kind == "compute":
                request = kind, wanted - step
        self.vain += [slot.phase for slot in self.slots if slot.use == "prefetched"]
        return self

    def model(self) -> Iterator[tuple]:
        for number, call in enumerate(self.calls):
            start, waited = self.time, 0
            yield "compute", self.rates.dense_seconds
            self.call = call
            accesses = self.buffers[call.layer].run(call.active())
            turns = [access.expert for access in accesses]
            gone = []  # after how many turns who leaves
            for place, access in enumerate(accesses):
                if access.evicted is not None:
                    earlier = [turn + 1 for turn in range(place) if turns[turn] == access.evicted]
                    gone.append((max(earlier, default=0), access.evicted))
            done: set[int] = set()

            def leave(done=done, gone=gone, call=call):
                for pair in list(gone):
                    after, expert = pair
                    if after == 0 or after - 1 in done:
                        gone.remove(pair)
                        self.slots.remove(self.slot_of(call.layer, expert, "kept"))

            leave()
            missed = [access.expert for access in accesses if not access.hit]
            for slot in [each for each in self.slots if each.layer == call.layer and each.use == "prefetched"]:
                if slot.expert in missed:
                    slot.use, slot.vain = "kept", False
                elif slot.is_filled:
                    self.throw_away(slot)
                else:
                    slot.vain = True
            self.queue = [expert for expert in missed if self.slot_of(call.layer, expert, "kept") is None]
            if not self.in_turn:
                self.queue = sorted(self.queue, key=lambda expert: (-int(call.load[expert]), expert))
            self.passing = [access.evicted for access in accesses if access.evicted in missed]
            self.guesses = [] if self.prefetcher.is_late else list(self.prefetcher.wanted(number))
            left = list(range(len(turns)))
            while left:
                hits = [turn for turn in left if accesses[turn].hit]
                if self.in_turn:
                    together = left[:1]
                    while accesses[left[0]].hit and left[len(together) :] and accesses[left[len(together)]].hit:
                        together = left[: len(together) + 1]
                else:
                    together = hits or [turn for turn in left if self.filled((call.layer, turns[turn]))]
                    if not together:
                        before = self.time
                        yield "wait", [(call.layer, turns[turn]) for turn in left]
                        waited += self.time - before
                        continue
                if self.in_turn and not accesses[left[0]].hit:
                    before = self.time
                    yield "wait", [(call.layer, turns[left[0]])]
                    waited += self.time - before
                rows = [int(call.load[turns[turn]]) for turn in together]
                seconds = [self.rates.expert_seconds + count * self.rates.row_seconds for count in rows]
                yield "compute", sum(seconds)
                done.update(together)
                left = [turn for turn in left if turn not in done]
                leave()
            if self.prefetcher.is_late:
                self.guesses = list(self.prefetcher.wanted(number))
            self.spent.append((call.phase, self.time - start, waited))

    def slot_of(self, layer, expert, use):
        found = [each for each in self.slots if (each.layer, each.expert, each.use) == (layer, expert, use)]
        return found[0] if found else None

    def filled(self, key) -> bool:
        slot = self.slot_of(*key, "kept")
        return slot is not None and slot.is_filled

    def throw_away(self, slot):
        self.slots.remove(slot)
        self.vain.append(slot.phase)

    def coming(self):
        return [slot for slot in self.slots if not slot.is_filled]

    def room(self, layer, use) -> int:
        """How many more slots may be taken."""
        kept = {name: 0 for name in self.buffers}
        for slot in self.slots:
            kept[slot.layer] += slot.use == "kept"
        lent = sum(max(0, count - self.buffers[name].size) for name, count in kept.items())
        room = self.staging - lent - sum(slot.use == "prefetched" for slot in self.slots)
        return room + (max(0, self.buffers[layer].size - kept[layer]) if use == "kept" else 0)

    def start_reads(self):
        layer, phase = self.call.layer, self.call.phase
        while len(self.coming()) < self.rates.readers:
            if self.queue:
                spare = [slot for slot in self.slots if slot.use == "prefetched" and slot.is_filled]
                room = self.room(layer, "kept")
                if room + len(spare) == 0:
                    return
                if room == 0:
                    self.throw_away(spare[-1])
                expert = self.queue[0]
                waiting = [each for each in self.queue if each in self.passing]
                passing = [each for each in self.passing if self.slot_of(layer, each, "kept")]
                if room + len(spare) == 1 and waiting and not passing and not self.in_turn:
                    expert = waiting[0]
                self.queue.remove(expert)
                self.begin(layer, expert, "kept", phase)
                continue
            if self.coming() or not self.room(layer, "prefetched"):
                return
            while self.guesses and self.is_known(*self.guesses[0]):
                del self.guesses[0]
            if not self.guesses:
                return
            self.begin(*self.guesses.pop(0), "prefetched", phase)

    def is_known(self, layer, expert) -> bool:
        return expert in self.buffers[layer].resident or self.slot_of(layer, expert, "prefetched") is not None

    def begin(self, layer, expert, use, phase):
        self.slots.append(Slot(layer, expert, use, phase, self.rates.latency, self.rates.expert_bytes))
        self.reads.append(phase)

    def time_to_next_event(self, computing):
        transferring = [slot for slot in self.coming() if slot.latency == 0]
        steps = [slot.latency for slot in self.coming() if slot.latency]
        steps += [slot.left * len(transferring) / self.rates.disk_rate for slot in transferring]
        steps += [] if computing is None else [computing]
        return min(steps)

    def let_pass(self, step):
        transferring = [slot for slot in self.coming() if slot.latency == 0]
        for slot in self.coming():
            if slot in transferring:
                slot.left -= step * self.rates.disk_rate / len(transferring)
            else:
                slot.latency -= step
        for slot in transferring:
            if slot.is_filled and slot.vain:
                self.throw_away(slot)
        self.time += step
