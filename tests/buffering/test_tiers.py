"""Main memory between disk and slots: what is read again, what is not, and what a failed read leaves."""

import pytest
import torch
from buffer_makers import weights_of
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

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
