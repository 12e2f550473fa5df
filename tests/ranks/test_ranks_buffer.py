"""Several ranks with buffers: the simulated hits and misses of every rank are the served ones."""

import commands
import pytest
from rank_commands import MT_LAYERS, Told, arguments_of, assert_same_lines, shuffled, telling

from fairseq_moe_ext.balancing.placement import Placement, contiguous, save_placement
from fairseq_moe_ext.buffering.rounds import loads_of_ranks
from fairseq_moe_ext.buffering.simulation import simulate

PAIR = ("--expert-order", "ascending", "--expert-eviction", "lifo")


@pytest.mark.parametrize(("ranks", "size", "placed"), [(2, 2, True), pytest.param(3, 1, False, marks=pytest.mark.slow)])
def test_the_simulator_tells_what_every_rank_misses(shared_goldens, tmp_path, ranks, size, placed):
    arguments = arguments_of(shared_goldens, "mt_nllb_ws2", "--batch-size", 8, "--max-len-b", 8)
    one = commands.generate(*arguments, *telling(tmp_path))
    trace = Told.read(tmp_path).trace
    places = shuffled(MT_LAYERS, ranks) if placed else dict.fromkeys(MT_LAYERS, contiguous(8, ranks))
    save_placement(tmp_path / "placement.json", Placement(ranks, places))
    flags = ("--expert-placement", tmp_path / "placement.json", "--expert-buffer-size", size, "--expert-store", "disk")
    done = commands.run("generate", *arguments, *flags, *PAIR, *telling(tmp_path), ranks=ranks)
    assert_same_lines(done.stdout, one)
    simulated = loads_of_ranks(trace, places, ranks)
    for rank in Told.read(tmp_path).report["ranks"]:
        outcomes = [simulate(layer, size, "ascending", "lifo") for layer in simulated[rank["rank"]]]
        assert rank["misses"] == sum(each.misses for each in outcomes) > 0
        assert rank["hits"] + rank["misses"] == sum(each.accesses for each in outcomes)


@pytest.mark.parametrize("size", [1, pytest.param("auto", marks=pytest.mark.slow)])
def test_ranks_in_different_layers_fetch_in_half_precision(shared_goldens, tmp_path, size):
    """Several layers' copies run at once; one rank holds nothing of a layer, another nothing at all."""
    flags = ("--beam", 2, "--batch-size", 4, "--max-len-b", 6, "--moe-dtype", "float16")
    arguments = arguments_of(shared_goldens, "mt_plain", *flags)
    one = commands.generate(*arguments)
    encoder, decoder = MT_LAYERS
    places = {encoder: [(expert % 2,) for expert in range(8)], decoder: [(0,)] * 8}
    save_placement(tmp_path / "placement.json", Placement(3, places))
    flags = ("--expert-placement", tmp_path / "placement.json", "--expert-buffer-size", size, "--expert-store", "disk")
    done = commands.run("generate", *arguments, *flags, *telling(tmp_path), ranks=3)
    assert_same_lines(done.stdout, one)
    held = [rank["expert_bytes"] for rank in Told.read(tmp_path).report["ranks"]]
    assert held[0] == 3 * held[1] and held[2] == 0


def test_a_placement_that_does_not_fit_the_trace(shared_goldens, tmp_path):
    flags = ("--batch-size", 100, "--max-len-b", 2)
    commands.generate(*arguments_of(shared_goldens, "mt_nllb_ws2", *flags), *telling(tmp_path))
    trace = Told.read(tmp_path).trace
    for places in ({}, dict.fromkeys(MT_LAYERS, contiguous(7, 2)), dict.fromkeys(MT_LAYERS, [(0, 1)] * 8)):
        with pytest.raises(ValueError, match="the placement must hold each of the 8 experts of .* once"):
            loads_of_ranks(trace, places, 2)
