"""Capacity-aware inference by fairseq's own commands: what it leaves alone, what it says it did, and on real ranks."""

import json
import math

import commands
import numpy as np
import pytest
from rank_commands import LM_LAYERS, MT_LAYERS, Told, arguments_of, loss_of, telling

from fairseq_moe_ext.balancing.placement import Placement, contiguous, save_placement

EXPERTS, TOKENS = 8, 15035  # of the goldens; LM data set
FIRST = {"lm_top2_ws2": LM_LAYERS[0], "mt_plain": MT_LAYERS[0]}  # the layer that a capacity gives the same inputs
SETTINGS = {
    "drop": ("--moe-capacity-factor", "0.5"),
    "reroute": ("--moe-capacity-factor", "0.5", "--moe-overflow", "reroute"),
    # below 1 no expert of these has room for another's overflow
    "expand": ("--moe-capacity-factor", "1", "--moe-overflow", "expand", "--moe-virtual-ranks", "2"),
}
FACTOR = {"drop": 0.5, "reroute": 0.5, "expand": 1.0}
LARGE = {
    "drop": ("--moe-overflow", "drop", "--moe-drop-metric", "random"),
    "reroute": ("--moe-overflow", "reroute", "--moe-capacity-scope", "rank", "--moe-virtual-ranks", "3"),
    "expand": ("--moe-overflow", "expand", "--moe-virtual-ranks", "2", "--moe-renormalize-after-drop"),
}


def eval_lm(goldens, folder, *flags, rows=8):
    """(what the command gave, what it told) in this process."""
    folder.mkdir(exist_ok=True)
    arguments = arguments_of(goldens, "lm_top2_ws2", "--batch-size", rows, *telling(folder), *flags)
    return commands.eval_lm(*arguments), Told.read(folder)


def generate(goldens, folder, *flags):
    folder.mkdir(exist_ok=True)
    short = () if "--score-reference" in flags else ("--max-len-b", 10)
    arguments = arguments_of(goldens, "mt_plain", "--batch-size", 36, *short, *telling(folder), *flags)
    return commands.generate(*arguments), Told.read(folder)


@pytest.fixture(scope="module")
def free_lm(shared_goldens, tmp_path_factory):
    return eval_lm(shared_goldens, tmp_path_factory.mktemp("free_lm"))


@pytest.fixture(scope="module")
def free_mt(shared_goldens, tmp_path_factory):
    return generate(shared_goldens, tmp_path_factory.mktemp("free_mt"))


@pytest.fixture(scope="module", params=SETTINGS)
def capped_lm(request, shared_goldens, tmp_path_factory):
    """(overflow rule, result, what it told)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *eval_lm(shared_goldens, folder, *SETTINGS[request.param])


def dropped(told: Told) -> dict[str, int]:
    return {name: layer["dropped"] for name, layer in told.layers().items()}


# --- a capacity that nothing fills changes nothing


@pytest.mark.parametrize("overflow", ["drop", pytest.param("reroute", marks=pytest.mark.slow), "expand"])
def test_a_large_capacity_changes_no_score(shared_goldens, tmp_path, free_lm, overflow):
    found, told = eval_lm(shared_goldens, tmp_path, "--moe-capacity-factor", "100", *LARGE[overflow])
    wanted = free_lm[0].by_id()
    for number, scores in found.by_id().items():
        assert np.array_equal(scores, wanted.pop(number))
    assert not wanted and found.loss == free_lm[0].loss
    assert set(dropped(told).values()) == {0}
    assert all(layer["rerouted"] == layer["dropped_fraction"] == 0 for layer in told.layers().values())


@pytest.mark.parametrize("overflow", ["reroute", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_large_capacity_changes_no_line(shared_goldens, tmp_path, free_mt, overflow):
    found, told = generate(shared_goldens, tmp_path, "--moe-capacity-factor", "100", *LARGE[overflow])
    assert found.lines == free_mt[0].lines and len(found.of_kind("H")) == 100
    assert set(dropped(told).values()) == {0}


# --- the report


def test_the_report_adds_up(capped_lm):
    overflow, _, told = capped_lm
    for name, layer in told.layers().items():
        assert sum(layer["load_before"]) == layer["assignments"] == 2 * TOKENS
        assert sum(layer["load"]) == layer["assignments"] - layer["dropped"]
        assert 0 < layer["dropped"] < layer["assignments"]
        if overflow == "drop":
            assert layer["rerouted"] == 0
            assert all(after <= before for after, before in zip(layer["load"], layer["load_before"], strict=True))
        else:
            gained = np.maximum(np.array(layer["load"]) - layer["load_before"], 0).sum()
            assert gained <= layer["rerouted"] and 0 < layer["rerouted"] < layer["assignments"]
        prefill = told.trace["prefill"]
        assert prefill.load[:, prefill.names.index(name)].sum(axis=0).tolist() == layer["load"]
        assert layer["seconds"]["capacity"] > 0


def test_no_expert_is_above_its_capacity(capped_lm, free_lm):
    """T: the assignments of a pass over K; each of two virtual ranks has half the rows, all of 128 tokens but one."""
    overflow, _, told = capped_lm
    ranks = 2 if overflow == "expand" else 1
    for name in LM_LAYERS:
        loads = told.trace["prefill"].load[:, told.trace["prefill"].names.index(name)].astype(int)
        tokens = free_lm[1].trace["prefill"].load[:, 0].sum(axis=1) // 2
        whole = tokens == 8 * 128
        assert whole.sum() >= 13
        limit = ranks * math.floor(FACTOR[overflow] * (8 * 128 // ranks) * 2 / EXPERTS)
        assert loads[whole].max() == limit


def test_the_first_layers_dropped_fraction_is_the_papers(capped_lm, free_lm):
    overflow, _, told = capped_lm
    layer = told.layers()[FIRST["lm_top2_ws2"]]
    free = free_lm[1].trace["prefill"]
    loads = free.load[:, free.names.index(FIRST["lm_top2_ws2"])].astype(float)  # (S, E), as the gate chose
    assert layer["load_before"] == loads.sum(axis=0).tolist()
    fraction = np.maximum(loads - FACTOR[overflow] * loads.mean(axis=1, keepdims=True), 0).sum() / loads.sum()
    if overflow == "expand":  # counted for each virtual rank's tokens, which the trace does not tell apart
        assert fraction <= layer["dropped_fraction"] < fraction + 0.1
    else:
        assert layer["dropped_fraction"] == pytest.approx(fraction)
    if overflow == "drop":  # but for what rounding a capacity down drops, at most one in each expert and pass
        assert 0 <= layer["dropped"] - layer["dropped_fraction"] * layer["assignments"] <= EXPERTS * len(loads)


# --- phases, beams


def test_decode_steps_are_capped_unless_prefill_alone_is_wanted(shared_goldens, tmp_path, free_mt):
    flags = ("--moe-capacity-factor", "0.5", "--moe-virtual-ranks", "2")
    prefill, of_prefill = generate(shared_goldens, tmp_path / "prefill", *flags, "--moe-capacity-phases", "prefill")
    _, of_all = generate(shared_goldens, tmp_path / "all", *flags)
    encoder, decoder = MT_LAYERS
    assert dropped(of_prefill)[encoder] > 0 and dropped(of_prefill)[decoder] == 0
    layer = of_prefill.layers()[decoder]
    assert layer["load_before"] == layer["load"] and layer["dropped_fraction"] == 0
    assert dropped(of_all)[encoder] == dropped(of_prefill)[encoder] and dropped(of_all)[decoder] > 0
    assert prefill.lines != free_mt[0].lines and len(prefill.of_kind("H")) == 100
    # a batch's first decode step has 4 beams of every sentence, half of them on each virtual rank
    decode = of_all.trace["decode"]
    firsts = [decode.load[decode.batch == batch][0, 0].astype(int) for batch in range(4)]
    for load, sentences in zip(firsts, (32, 32, 32, 4), strict=True):
        assert load.max() <= 2 * math.floor(0.5 * (4 * sentences // 2) * 2 / EXPERTS)


@pytest.mark.slow
def test_references_that_are_scored_are_prefill(shared_goldens, tmp_path):
    flags = ("--moe-capacity-factor", "0.5", "--moe-capacity-phases", "prefill", "--score-reference")
    _, told = generate(shared_goldens, tmp_path, *flags)
    assert all(number > 0 for number in dropped(told).values())


# --- real and virtual ranks, placement, buffer


@pytest.mark.slow
def test_virtual_ranks_foretell_real_ones(shared_goldens, tmp_path):
    """Batches of 4 go to two ranks in turn: as the halves of batches of 8 go to two virtual ranks."""
    (tmp_path / "real").mkdir()
    arguments = arguments_of(shared_goldens, "lm_top2_ws2", "--batch-size", 4, *telling(tmp_path / "real"))
    flags = ("--moe-capacity-factor", "1", "--moe-overflow", "expand")
    done = commands.run("eval-lm", *arguments, *flags, ranks=2)
    _, virtual = eval_lm(shared_goldens, tmp_path / "virtual", *flags, "--moe-virtual-ranks", "2")
    found, wanted = Told.read(tmp_path / "real").trace["prefill"].load, virtual.trace["prefill"].load
    assert found.shape[0] == 30 and wanted.shape[0] == 15
    # the last batch of 6 is dealt out as 3 and 3, not as 4 and 2
    assert (found[0:28:2].astype(int) + found[1:28:2]).tolist() == wanted[:14].tolist()
    assert float(loss_of(done)[0]) > 7.4446  # what it is without a capacity
    real = Told.read(tmp_path / "real")
    for name, layer in real.layers().items():
        assert layer["dropped"] == layer["assignments"] - sum(layer["load"]) > 0
        assert sum(layer["load_before"]) == layer["assignments"] == virtual.layers()[name]["assignments"]
        assert layer["load_before"] == virtual.layers()[name]["load_before"] or name != FIRST["lm_top2_ws2"]


@pytest.mark.slow
def test_a_large_capacity_on_two_ranks(shared_goldens, tmp_path):
    arguments = arguments_of(shared_goldens, "lm_top2_ws2", "--batch-size", 8, *telling(tmp_path))
    flags = ("--moe-capacity-factor", "100", "--moe-overflow", "expand", "--moe-capacity-scope", "rank")
    assert loss_of(commands.run("eval-lm", *arguments, *flags, ranks=2)) == ("7.4446", "174.20")
    assert set(dropped(Told.read(tmp_path)).values()) == {0}


def test_a_placement_says_whose_experts_are_a_virtual_ranks_own(shared_goldens, tmp_path):
    places = {"rising": contiguous(EXPERTS, 2), "in turn": tuple((expert % 2,) for expert in range(EXPERTS))}
    for name, place in places.items():
        save_placement(tmp_path / f"{name}.json", Placement(2, dict.fromkeys(LM_LAYERS, place)))
    flags = {name: ("--expert-placement", tmp_path / f"{name}.json") for name in places} | {"none": ()}
    loads = {}
    for name in flags:
        part = ("--num-shards", 4, "--shard-id", 0)
        _, told = eval_lm(shared_goldens, tmp_path / "out", *SETTINGS["expand"], *part, *flags[name])
        loads[name] = told.trace["prefill"].load
    assert loads["none"].tolist() == loads["rising"].tolist() != loads["in turn"].tolist()
    with pytest.raises(ValueError, match="--expert-placement .* must be for the ranks that serve, 3, got 2"):
        eval_lm(
            shared_goldens, tmp_path / "out", "--moe-capacity-factor", "1", "--moe-virtual-ranks", "3",
            "--expert-placement", tmp_path / "rising.json",
        )


def test_virtual_ranks_that_outnumber_the_experts(shared_goldens, tmp_path):
    with pytest.raises(ValueError, match="--moe-virtual-ranks must be at most the experts of a layer, 8, got 9"):
        eval_lm(shared_goldens, tmp_path, "--moe-capacity-factor", "1", "--moe-virtual-ranks", "9")


@pytest.mark.parametrize("overflow", ["reroute", pytest.param("expand", marks=pytest.mark.slow)])
def test_overflow_goes_to_resident_experts_first(shared_goldens, tmp_path, overflow):
    flags = ("--moe-capacity-factor", "0.5", "--moe-overflow", overflow)
    flags += ("--expert-buffer-size", "2", "--expert-store", "disk", "--max-len-b", 200)
    plain, of_plain = generate(shared_goldens, tmp_path / "plain", *flags)
    flags += ("--moe-reroute-prefer", "resident")
    preferring, of_preferring = generate(shared_goldens, tmp_path / "preferring", *flags)
    misses = [told.report["ranks"][0]["misses"] for told in (of_plain, of_preferring)]
    print(f"{overflow}: {misses[0]} misses, {misses[1]} where resident experts are preferred")
    assert plain.lines != preferring.lines
    if overflow == "reroute":  # of expand's few candidates the resident ones have no room here
        assert misses[1] < misses[0]
    for told in (of_plain, of_preferring):
        layer = told.layers()[MT_LAYERS[1]]
        assert layer["rerouted"] > 0 and sum(layer["load"]) == layer["assignments"] - layer["dropped"]


@pytest.mark.slow
def test_random_follows_the_seed(shared_goldens, tmp_path):
    flags = ("--moe-capacity-factor", "0.5", "--moe-drop-metric", "random")
    losses = [eval_lm(shared_goldens, tmp_path, *flags, "--seed", seed)[0].loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert json.loads((tmp_path / "report.json").read_text())["layers"][0]["dropped"] > 0
