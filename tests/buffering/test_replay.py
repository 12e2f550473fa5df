"""The replay's two clocks beside a naive twin, by hand, and what must hold whatever is replayed."""

from fractions import Fraction

import numpy as np
import pytest
from replay_twin import Twin

from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES, Buffer
from fairseq_moe_ext.buffering.foresight import Foresight, misses_with_foresight
from fairseq_moe_ext.buffering.model_calls import ModelCall, following_layers, model_calls
from fairseq_moe_ext.buffering.prefetchers import HotSet, LastStep, NextLayers, Nothing, Oracle, Predicted
from fairseq_moe_ext.buffering.rates import Costs, Rates
from fairseq_moe_ext.buffering.replay import replay
from fairseq_moe_ext.trace import TraceRecorder

LAYERS = {"encoder": ("e0", "e1"), "prefill": ("d0", "d1", "d2"), "decode": ("d0", "d1", "d2")}
SIZES = {"e0": 2, "e1": 1, "d0": 3, "d1": 2, "d2": 1}
EXPERTS = 5


def made_calls(seed: int, batches: int = 4) -> list[ModelCall]:
    generator = np.random.default_rng(seed)
    recorder = TraceRecorder()
    for batch in range(batches):
        phases = ["encoder"] + (["prefill"] if generator.random() < 0.3 else []) + ["decode"] * generator.integers(1, 5)
        for phase in phases:
            recorder.begin_step(phase, batch)
            for layer in LAYERS[phase]:
                recorder.add(layer, generator.poisson(0.8, EXPERTS).tolist())
    return model_calls(recorder.trace())


def made_rates(seed: int) -> Rates:
    """In quarters, so that much happens in one moment, or in odd shares of a second, so that nothing does."""
    generator = np.random.default_rng(seed)

    def drawn(most: int) -> Fraction:
        return Fraction(int(generator.integers(0, most)), 4 if seed % 2 else int(generator.integers(3, 50)))

    readers = int(generator.integers(1, 4))
    return Rates(Fraction(12), 1 + drawn(20), drawn(3), readers, drawn(4), drawn(2), drawn(20), drawn(3))


def buffers_of(calls, policy="lfu", order="resident-first"):
    return {name: Buffer(SIZES[name], policy, order, range(SIZES[name])) for name in {call.layer for call in calls}}


def prefetchers(calls, seed: int = 0):
    generator = np.random.default_rng(seed)
    wrong = [(call.layer, generator.random(EXPERTS)) for call in generator.permutation(np.array(calls, dtype=object))]
    totals = {name: generator.integers(0, 9, EXPERTS) for name in SIZES}
    return {
        "off": Nothing(),
        "layers": NextLayers(calls),
        "last-step": LastStep(calls),
        "hot-set": HotSet(calls, totals),
        "wrong": Predicted(wrong, is_late=False),
        "late": Predicted(wrong, is_late=True),
        "oracle": Oracle(calls),
        "oracle-all": Oracle(calls, None),
    }


def total(costs: dict[str, Costs]) -> Costs:
    return sum(costs.values(), Costs())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(7))
def test_replay_is_its_naive_twin_exactly(seed, order):
    calls, rates = made_calls(seed), made_rates(seed)
    staging, ahead, policy = seed % 4, (seed + 1) % 3, list(POLICIES)[seed % len(POLICIES)]
    slots, alone = (staging, ahead, order == "ascending"), seed % 3 == 0
    ours, theirs = prefetchers(calls, seed), prefetchers(calls, seed)
    for name in ours:
        found = replay(calls, buffers_of(calls, policy, order), rates, ours[name], *slots, alone=alone)
        twin = Twin(calls, buffers_of(calls, policy, order), rates, theirs[name], *slots, alone).run()
        for phase, costs in found.items():
            spent = [each for each in twin.spent if each[0] == phase]
            wanted = sum(each[1] for each in spent), sum(each[2] for each in spent)
            assert (costs.seconds, costs.waited) == wanted, (name, phase)
            assert (costs.reads, costs.in_vain) == (twin.reads.count(phase), twin.vain.count(phase)), (name, phase)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_of_every_prefetcher(seed):
    """Nothing is faster than all resident, nor than the disk; a wrong prefetch costs a call an expert's read."""
    calls, rates = made_calls(seed, batches=8), made_rates(seed)
    alone = seed % 2 == 0
    played = {
        name: replay(calls, buffers_of(calls), rates, each, alone=alone) for name, each in prefetchers(calls).items()
    }
    found = {name: total(costs) for name, costs in played.items()}
    off = found["off"]
    for name, costs in found.items():
        assert (costs.calls, costs.accesses, costs.misses) == (off.calls, off.accesses, off.misses)
        assert costs.seconds == costs.resident + costs.waited + costs.misses * rates.miss_seconds, name
        assert costs.seconds >= rates.least_reading(costs.misses), name
        assert costs.reads - costs.in_vain == costs.misses, name
        assert costs.seconds <= off.seconds + costs.calls * (rates.latency + rates.expert_bytes / rates.disk_rate)
    assert off.in_vain == found["oracle"].in_vain == 0
    # with slots for all; where they are few, experts that land together hold theirs until all of them are computed
    slots = {"staging": 50, "ahead": 50, "alone": True}
    roomy = [total(replay(calls, buffers_of(calls), rates, each, **slots)) for each in (Nothing(), Oracle(calls))]
    assert roomy[1].seconds <= roomy[0].seconds


def test_replay_by_hand():
    """One layer of two slots; an expert is read in 10 s and computed in 3."""
    recorder = TraceRecorder()
    for load in ([1, 0, 1, 0], [0, 1, 1, 2]):
        recorder.begin_step("decode", 0)
        recorder.add("d", load)
    calls, rates = model_calls(recorder.trace()), Rates(10, 1, expert_seconds=3, dense_seconds=4)

    def run(prefetcher, alone=False):
        buffers = {"d": Buffer(2, "lru", "resident-first", [0, 1])}
        return replay(calls, buffers, rates, prefetcher, alone=alone)["decode"]

    # 4 dense, gate; expert 2 comes 4-14 for expert 1, expert 0 is computed 4-7; waits 7-14; computed until 17.
    # 21 gate; expert 2 until 24; 3 comes 21-31, waits 7, until 34; 1 comes 31-41, waits 7, until 44.
    assert run(Nothing()) == Costs(2, 5, 3, 44, 21, 23, 3, 0)
    # alone, the oracle reads expert 3 from 14 to 24, 1 from 24 to 34; 24-27 expert 3, waits 7, until 37
    assert run(Oracle(calls), alone=True) == Costs(2, 5, 3, 37, 14, 23, 3, 0)
    # beside: expert 3 shares the disk with 2, both come 4-24, waits 17; 1 comes 24-34; 34-40 experts 3 and 1
    assert run(Oracle(calls)) == Costs(2, 5, 3, 40, 17, 23, 3, 0)
    # a guess of expert 0, which is resident, is read by nobody
    assert run(Predicted([("d", np.array([1, 0, 0, 0])), None], is_late=False)) == run(Nothing())
    # once expert 0 left for 2, it is read 14-24 in vain, sharing the disk with 3 from 21: that comes 21-34 in place of
    # 21-31, the hits are computed 21-27
    calls[0] = ModelCall(0, "decode", 0, "d", np.array([0, 1, 1, 0]))
    assert run(Nothing()) == Costs(2, 5, 2, 34, 11, 23, 2, 0)
    wrong = Predicted([("d", np.array([1, 0, 0, 0])), None], is_late=False)
    assert run(wrong, alone=True) == Costs(2, 5, 2, 37, 14, 23, 3, 1)


def test_two_readers_share_the_disk():
    calls = [ModelCall(0, "decode", 0, "d", np.array([0, 1, 1]))]

    def seconds(readers, latency=0):
        rates = Rates(10, 1, latency, readers, expert_seconds=1)
        return replay(calls, {"d": Buffer(2, "lru", "resident-first", [0])}, rates)["decode"].seconds

    assert seconds(1) == 21 and seconds(2) == 22  # both come in one moment
    assert seconds(1, latency=2) == 25 and seconds(2, latency=2) == 24


def test_foresight():
    """As `minimum_misses` where everything is known; the replay has the same misses."""
    from fairseq_moe_ext.buffering.eviction import minimum_misses

    calls = [call for call in made_calls(3, batches=30) if call.layer == "d0"]
    batches = [call.active() for call in calls]
    for size in (1, 2, 3, 4):
        least = minimum_misses(batches, size, "resident-first", list(range(size)))
        found = [misses_with_foresight(batches, size, range(size), horizon) for horizon in (0, 1, 4, None)]
        assert found[-1] == least and min(found) == least and found[0] >= found[1]
        costs = replay(calls, {"d0": Foresight(batches, size, range(size))}, Rates(1, 1), Oracle(calls))
        assert total(costs).misses == total(costs).reads == least


def test_following_layers():
    """Decode steps go on; an encoder is followed by the decoder, which knows no next batch."""
    calls = [ModelCall(0, "encoder", 0, name, np.ones(2)) for name in ("e0", "e1")]
    calls += [ModelCall(0, "decode", step, name, np.ones(2)) for step in (0, 1) for name in ("d0", "d1")]
    assert following_layers(calls) == ["e1", "d0", "d1", "d0", "d1", "d0"]
    scored = [ModelCall(batch, "prefill", batch, name, np.ones(2)) for batch in (0, 1) for name in ("d0", "d1")]
    assert following_layers(scored) == ["d1", "d0", "d1", "d0"]


@pytest.mark.parametrize("name, value", [("expert_bytes", 0), ("disk_rate", -1), ("readers", 0), ("latency", -0.1)])
def test_rates_are_checked(name, value):
    wanted = {"expert_bytes": 1, "disk_rate": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        Rates(**wanted)
