"""Main memory between disk and slots: what is read again, what is not, and what a failed read leaves."""

import pytest
import torch
from buffer_makers import weights_of
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.buffering import host_tier
from fairseq_moe_ext.buffering.host_tier import HostTier
from fairseq_moe_ext.buffering.store import FileStore, LazyTensors

EXPERTS = 5
WEIGHTS = weights_of(EXPERTS)
BYTES = sum(part.nbytes for part in WEIGHTS[0])


@examples(80)
@given(st.lists(st.integers(0, EXPERTS - 1), max_size=30), st.integers(1, EXPERTS + 1))
def test_the_least_recently_used_are_read_again(asked, capacity):
    tier = HostTier(FileStore(LazyTensors(WEIGHTS), torch.float32), capacity)
    recent: list[int] = []
    for expert in asked:
        targets = [torch.empty_like(part) for part in WEIGHTS[0]]
        assert tier.load(expert, targets) == (0 if expert in recent[:capacity] else BYTES)
        assert all(map(torch.equal, targets, WEIGHTS[expert]))
        recent = [expert, *(other for other in recent if other != expert)]


def test_conversion_reads_anew():
    tier = HostTier(FileStore(LazyTensors(WEIGHTS), torch.float32), 3)
    tier.load(0, [torch.empty_like(part) for part in WEIGHTS[0]])
    tier.convert(torch.float16)
    targets = [torch.empty_like(part, dtype=torch.float16) for part in WEIGHTS[0]]
    assert tier.load(0, targets) == BYTES
    assert all(torch.equal(target, part.half()) for target, part in zip(targets, WEIGHTS[0], strict=True))


class Unreliable(LazyTensors):
    """Fails at the last part of an expert when told to, once the others are written."""

    fails = False

    def fill(self, expert, part, target):
        if self.fails and part == 3:
            raise OSError("gone")
        return super().fill(expert, part, target)


def test_a_failed_read_is_not_kept():
    source = Unreliable(WEIGHTS)
    tier = HostTier(FileStore(source, torch.float32), 1)
    targets = [torch.empty_like(part) for part in WEIGHTS[0]]
    tier.load(0, targets)
    for expert in (1, 0, 1):
        source.fails = True
        with pytest.raises(OSError, match="gone"):
            tier.load(expert, targets)
        source.fails = False
    assert tier.load(1, targets) == BYTES
    assert all(map(torch.equal, targets, WEIGHTS[1]))


def test_a_tier_holds_at_least_one():
    with pytest.raises(ValueError, match="capacity must be at least 1 expert, got 0"):
        HostTier(FileStore(LazyTensors(WEIGHTS), torch.float32), 0)


class Device:
    """Stands in for a GPU's queue: copies out of pinned memory lie in it until an event is waited for.

    A copy out of other memory has left it when the call returns, as CUDA has it.
    """

    def __init__(self, refused: int):
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.pinned: set[int] = set()
        self._refused, self.asked = refused, 0

    def pin(self, tensors) -> bool:
        self.asked += 1
        if self.asked == self._refused:
            return False
        self.pinned |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return True

    def record_event(self):
        return Event(self, len(self.queue))

    def run(self, number: int) -> None:
        for target, part in self.queue[:number]:
            target.copy_(part)
        self.queue[:number] = [(torch.empty(0), torch.empty(0))] * number

    def targets(self) -> list[torch.Tensor]:
        return [Slot(part.shape, self) for part in WEIGHTS[0]]


class Event:
    def __init__(self, device: Device, number: int):
        self._device, self._number = device, number

    def synchronize(self) -> None:
        self._device.run(self._number)


class Slot(torch.Tensor):
    """A part of a slot on the device."""

    @staticmethod
    def __new__(cls, shape, device):
        slot = torch.zeros(shape).as_subclass(cls)
        slot.on = device
        return slot

    def copy_(self, part, non_blocking=False):
        values = self.as_subclass(torch.Tensor)
        if non_blocking and part.untyped_storage().data_ptr() in self.on.pinned:
            self.on.queue.append((values, part))
        else:
            values.copy_(part)
        return self


@pytest.mark.parametrize("refused", [0, 1, 2, 3])
@pytest.mark.parametrize("asked", [(0, 1, 2, 0, 1, 2, 3), (0, 1, 2, 3, 4, 3, 2, 1, 0), (0, 0, 1, 1, 2, 0, 3, 0, 4)])
def test_a_read_waits_for_the_copies_out_of_its_place(monkeypatch, refused, asked):
    """Whichever place could not be pinned; one allocation and one event for each."""
    device = Device(refused)
    monkeypatch.setattr(host_tier, "pin", device.pin)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: device)
    tier = HostTier(FileStore(LazyTensors(WEIGHTS), torch.float32), 3)
    tier.prepare(torch.device("cuda"))
    served = []
    for expert in asked:
        served.append((expert, device.targets()))
        tier.load(expert, served[-1][1])
    device.run(len(device.queue))
    for expert, targets in served:
        for target, part in zip(targets, WEIGHTS[expert], strict=True):
            assert torch.equal(target.as_subclass(torch.Tensor), part)
    assert device.asked == (refused or 3)  # a second refusal would be no news


@pytest.mark.parametrize("way", ["convert", "fail"])
def test_memory_goes_when_the_copies_out_of_it_are_done(monkeypatch, way):
    device = Device(refused=0)
    monkeypatch.setattr(host_tier, "pin", device.pin)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: device)
    source = Unreliable(WEIGHTS)
    tier = HostTier(FileStore(source, torch.float32), 1)
    tier.prepare(torch.device("cuda"))
    targets = device.targets()
    tier.load(0, targets)
    if way == "convert":
        tier.convert(torch.float16)
    else:
        source.fails = True
        with pytest.raises(OSError):
            tier.load(1, device.targets())
    for target, part in zip(targets, WEIGHTS[0], strict=True):
        assert torch.equal(target.as_subclass(torch.Tensor), part)


class Interrupted(LazyTensors):
    def fill(self, expert, part, target):
        target.fill_(float("nan"))
        raise KeyboardInterrupt


def test_an_interrupted_read_keeps_its_memory():
    tier = HostTier(FileStore(Interrupted(WEIGHTS), torch.float32), 1)
    for expert in range(3):
        with pytest.raises(KeyboardInterrupt):
            tier.load(expert, [torch.empty_like(part) for part in WEIGHTS[0]])
    tier._below = FileStore(LazyTensors(WEIGHTS), torch.float32)
    for expert in (1, 0):
        targets = [torch.empty_like(part) for part in WEIGHTS[0]]
        assert tier.load(expert, targets) == BYTES
        assert all(map(torch.equal, targets, WEIGHTS[expert]))
