"""replay.py's clock written once more from its description: one moment after another, every slot and read by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(eq=False)
class Slot:
    """layer, expert: whose. use: `kept`, or `prefetched`. latency, left: seconds and bytes until it is filled, once it
    has begun. is_ahead: by the prefetches' reader. vain: its layer did not want it."""

    layer: str
    expert: int
    use: str
    phase: str
    latency: float = 0
    left: float = 0
    begun: bool = False
    is_ahead: bool = False
    vain: bool = False

    @property
    def is_filled(self) -> bool:
        return self.latency == 0 and self.left == 0


class Twin:
    def __init__(self, calls, buffers, rates, prefetcher, staging, ahead, in_turn, alone=False):
        self.calls, self.buffers, self.rates = calls, buffers, rates
        self.prefetcher, self.staging, self.ahead, self.in_turn = prefetcher, staging, ahead, in_turn
        self.alone = alone
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
                if slot.expert not in missed and slot.is_filled:
                    self.throw_away(slot)
                slot.vain = slot.expert not in missed
            first = [expert for expert in missed if self.slot_of(call.layer, expert, "prefetched")]
            self.queue = missed
            if not self.in_turn:
                self.queue = sorted(missed, key=lambda expert: (expert not in first, -int(call.load[expert]), expert))
            self.passing = [access.evicted for access in accesses if access.evicted in missed]
            self.hand_out_slots()
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
                seconds += [self.rates.miss_seconds for turn in together if not accesses[turn].hit]
                yield "compute", sum(seconds)
                done.update(together)
                left = [turn for turn in left if turn not in done]
                leave()
                self.hand_out_slots()
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
        return [slot for slot in self.slots if slot.begun and not slot.is_filled]

    def room(self) -> int:
        """How many more slots the layer that is called may take."""
        kept = {name: 0 for name in self.buffers}
        for slot in self.slots:
            kept[slot.layer] += slot.use == "kept"
        lent = sum(max(0, count - self.buffers[name].size) for name, count in kept.items())
        return self.staging - lent + max(0, self.buffers[self.call.layer].size - kept[self.call.layer])

    def hand_out_slots(self):
        layer, phase = self.call.layer, self.call.phase
        while self.queue and self.room() > 0:
            expert = self.queue[0]
            waiting = [each for each in self.queue if each in self.passing]
            passing = [each for each in self.passing if self.slot_of(layer, each, "kept")]
            if self.room() == 1 and waiting and not passing and not self.in_turn:
                expert = waiting[0]
            self.queue.remove(expert)
            slot = self.slot_of(layer, expert, "prefetched")
            if slot is None:
                self.slots.append(Slot(layer, expert, "kept", phase, self.rates.latency, self.rates.expert_bytes))
            else:
                slot.use, slot.vain = "kept", False

    def start_reads(self):
        for slot in [slot for slot in self.slots if not slot.begun and not slot.is_filled]:
            if len([each for each in self.coming() if not each.is_ahead]) < self.rates.readers:
                slot.begun = True
                self.reads.append(slot.phase)
        staged = [slot for slot in self.slots if slot.use == "prefetched"]
        if self.queue or any(slot.is_ahead for slot in self.coming()) or len(staged) >= self.ahead:
            return
        if self.alone and any(slot.use == "kept" for slot in self.slots if not slot.is_filled):
            return
        while self.guesses and self.is_known(*self.guesses[0]):
            del self.guesses[0]
        if self.guesses:
            read = self.rates.latency, self.rates.expert_bytes
            self.slots.append(Slot(*self.guesses.pop(0), "prefetched", self.call.phase, *read, True, True))
            self.reads.append(self.call.phase)

    def is_known(self, layer, expert) -> bool:
        return expert in self.buffers[layer].resident or self.slot_of(layer, expert, "prefetched") is not None

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
