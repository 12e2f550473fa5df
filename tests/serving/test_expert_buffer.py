"""A served model with its experts in a buffer: the resident model's results, a report that the simulator repeats."""

import json
import logging
from itertools import product

import commands
import pytest
import torch
from buffer_makers import buffered
from model_makers import language_model
from served_models import EVERY_MODEL, Loader

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES
from fairseq_moe_ext.buffering.simulation import hottest_experts, layers_of, simulate
from fairseq_moe_ext.buffering.slot_pool import STAGING_SLOTS
from fairseq_moe_ext.serving.expert_buffer import BufferSettings, ExpertBuffer
from fairseq_moe_ext.trace import load_trace

STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.3")
HALVES = (("--moe-dtype", "float16"), ("--moe-dtype", "bfloat16"))


@pytest.fixture(scope="module")
def loader(shared_goldens):
    return Loader(shared_goldens)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def unless(chosen: tuple, *lists) -> list:
    """All combinations; those that are not chosen are slow."""
    return [each if each in chosen else slow(*each) for each in product(*lists)]


QUICK = (("mt_plain", 1, "host"), ("lm_top2", 1, "disk"), ("mt_nllb_ws2", 1, "built"), ("lm_top2", 1, "built"))


@pytest.mark.parametrize(
    ("name", "size", "store"), unless(QUICK, EVERY_MODEL, (1, 2, 5, 7, 8), ("host", "disk", "built"))
)
def test_logits_are_the_resident_ones(loader, name, size, store, tmp_path):
    flags = ("--expert-store", "host") if store == "host" else ("--expert-store", "disk")
    flags += ("--expert-store-dir", str(tmp_path)) if store == "built" else ()
    found = loader.logits(name, {}, *buffered(size, *flags))
    assert torch.equal(found, loader.logits(name, {}))
    layers = 1 if name.startswith("mt") else 2
    assert len(list(tmp_path.iterdir())) == (layers * (2 if name.startswith("mt") else 1) if store == "built" else 0)


PAIRS = tuple(("mt_plain", policy, order) for policy, order in zip(POLICIES, ORDERS * 2, strict=True))


@pytest.mark.parametrize(("name", "policy", "order"), unless(PAIRS, ("lm_top2", "mt_plain"), POLICIES, ORDERS))
def test_every_policy_and_order(loader, name, policy, order):
    flags = buffered(3, "--expert-eviction", policy, "--expert-order", order, "--expert-store", "disk")
    assert torch.equal(loader.logits(name, {}, *flags), loader.logits(name, {}))


WAYS = (("lm_top2", "disk", STATIC), ("lm_top2", "disk", HALVES[0]), ("mt_nllb_ws2", "host", HALVES[1]))


@pytest.mark.parametrize(
    ("name", "store", "how"), unless(WAYS, ("lm_top2", "mt_nllb_ws2"), ("disk", "host"), (STATIC, *HALVES))
)
def test_static_gating_and_every_dtype(loader, name, store, how):
    flags = buffered(2, "--expert-store", store)
    assert torch.equal(loader.logits(name, {}, *how, *flags), loader.logits(name, {}, *how))


def test_every_choice_is_among_the_quick_ones():
    chosen = {part for case in (*QUICK, *PAIRS, *WAYS) for part in case}
    assert chosen >= {*EVERY_MODEL, *POLICIES, *ORDERS, "host", "disk", "built", STATIC, *HALVES}


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--moe-dtype", "float16")])
@pytest.mark.parametrize("store", ["host", "disk"])
def test_fairseqs_own_half_precision(shared_goldens, store, more):
    """fairseq halves the model when the weights are there, or --moe-dtype does before; another dtype is refused."""
    golden = shared_goldens / "lm_top2"
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_last.pt", *commands.LM, "--fp16", *more)
    resident = commands.eval_lm(*arguments, "--max-tokens", "2048").by_id()
    found = commands.eval_lm(*arguments, "--max-tokens", "2048", *buffered(3, "--expert-store", store)).by_id()
    assert found.keys() == resident.keys()
    assert all((found[number] == row).all() for number, row in resident.items())


@pytest.mark.parametrize("scope", ["encoder", "decoder"])
def test_the_scope(loader, scope):
    model = loader.load("mt_plain", {}, *buffered(2, "--expert-buffer-scope", scope))
    kinds = {name.split(".")[0]: type(layer.experts) for name, layer in model.moe_layers().items()}
    assert {side for side, kind in kinds.items() if kind is BufferedExperts} == {scope}
    flags = buffered(2, "--expert-buffer-scope", scope)
    assert torch.equal(loader.logits("mt_plain", {}, *flags), loader.logits("mt_plain", {}))


def test_a_scope_without_layers_is_said(loader, caplog):
    with caplog.at_level(logging.WARNING, "fairseq_moe_ext"):
        flags = buffered(2, "--expert-buffer-scope", "encoder")
        assert torch.equal(loader.logits("lm_top2", {}, *flags), loader.logits("lm_top2", {}))
    assert "--expert-buffer-scope encoder: the model has no MoE layer there" in caplog.text


def test_more_places_than_experts(loader, caplog):
    with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
        model = loader.load("lm_top2", {}, *buffered(9))
    assert "--expert-buffer-size 9 is more than its 8 experts: all of them are resident" in caplog.text
    assert not [layer for layer in model.moe_layers().values() if isinstance(layer.experts, BufferedExperts)]
    assert torch.equal(loader.logits("lm_top2", {}, *buffered(9)), loader.logits("lm_top2", {}))


def test_auto_takes_what_fits(loader, caplog):
    with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
        found = loader.logits("lm_top2", {}, *buffered("auto", "--expert-store", "disk"))
    assert "--expert-buffer-size auto: 8 experts per layer" in caplog.text  # a machine has room for these
    assert torch.equal(found, loader.logits("lm_top2", {}))


def test_a_host_store_on_a_cpu_names_disk(loader, caplog):
    with caplog.at_level(logging.WARNING, "fairseq_moe_ext"):
        loader.load("lm_top2", {}, *buffered(2))
    assert "--expert-store host saves nothing on a CPU" in caplog.text and "--expert-store disk" in caplog.text


class Run:
    """One run of a command: its results, report and trace."""

    def __init__(self, goldens, folder, name, *flags):
        command, arguments = ("eval_lm", commands.LM) if name.startswith("lm") else ("generate", commands.MT)
        files = ("--moe-report", folder / "report.json", "--moe-trace", folder / "trace.npz")
        path = goldens / name / "checkpoint_last.pt"
        batch = ("--batch-size", "8") if command == "eval_lm" else ("--batch-size", "36", "--max-len-b", "10")
        self.result = getattr(commands, command)(
            goldens / name / "data-bin", "--path", path, *files, *arguments, *batch, *flags
        )
        self.report = json.loads((folder / "report.json").read_text())
        self.layers = {layer["name"]: layer for layer in self.report["layers"]}
        self.recorded = layers_of(load_trace(folder / "trace.npz"))


@pytest.mark.parametrize("name", ["lm_top2", "mt_plain"])
@pytest.mark.parametrize(("size", "policy", "order"), [
    (2, "lfu", "resident-first"), (3, "lifo", "ascending"),
    slow(1, "fifo", "resident-first"), slow(5, "lru", "ascending"), slow(4, "lfu", "ascending"),
    slow(8, "lru", "resident-first"), slow(7, "lifo", "resident-first"), slow(6, "fifo", "ascending"),
])
def test_the_simulator_repeats_a_served_run(shared_goldens, tmp_path, name, size, policy, order):
    pair = ("--expert-eviction", policy, "--expert-order", order)
    run = Run(shared_goldens, tmp_path, name, *buffered(size, "--expert-store", "disk", *pair))
    for layer in run.recorded:
        found, wanted = run.layers[layer.name], simulate(layer, size, order, policy)
        assert (found["hits"], found["misses"]) == (wanted.accesses - wanted.misses, wanted.misses)
        assert found["disk_reads"] == found["misses"] and found["host_reads"] == 0
        assert found["bytes_copied"] == found["bytes_read"]
        assert found["seconds"]["copy"] <= found["seconds"]["experts"]
    assert run.report["ranks"][0]["misses"] == sum(layer["misses"] for layer in run.layers.values())
    assert run.report["ranks"][0]["hits"] == sum(layer["hits"] for layer in run.layers.values())
    memory, layers = run.report["memory"], len(run.layers)
    slots = min(layers * size + STAGING_SLOTS, layers * 8)
    assert memory["expert_bytes_resident"] == memory["expert_bytes_total"] * slots // (layers * 8)


@pytest.mark.parametrize("name", ["lm_top2", "mt_plain"])
def test_copies_for_the_next_layers(shared_goldens, tmp_path, name):
    """The same results and misses, some of which were fetched before their call."""
    disk = buffered(2, "--expert-store", "disk")
    without = Run(shared_goldens, tmp_path, name, *disk)
    found = Run(shared_goldens, tmp_path, name, *disk, "--expert-prefetch", "layers")
    if name.startswith("mt"):
        assert found.result.lines == without.result.lines
    else:
        assert all((row == without.result.by_id()[number]).all() for number, row in found.result.by_id().items())
    for layer, wanted in without.layers.items():
        assert (found.layers[layer]["hits"], found.layers[layer]["misses"]) == (wanted["hits"], wanted["misses"])
        assert wanted["prefetched"] == wanted["prefetched_in_vain"] == 0
    assert sum(layer["prefetched"] for layer in found.layers.values()) > 0


def test_a_run_from_a_profile(shared_goldens, tmp_path):
    first = Run(shared_goldens, tmp_path, "mt_plain")
    assert first.report["ranks"][0]["misses"] == 0 == first.report["ranks"][0]["hits"]
    (tmp_path / "trace.npz").rename(tmp_path / "profile.npz")
    profile = ("--expert-profile", tmp_path / "profile.npz")
    second = Run(shared_goldens, tmp_path, "mt_plain", *buffered(3), *profile)
    assert second.result.lines == first.result.lines
    for layer in second.recorded:
        wanted = simulate(layer, 3, "resident-first", "lfu", ranking=hottest_experts(layer))
        assert second.layers[layer.name]["misses"] == wanted.misses
        assert second.layers[layer.name]["host_reads"] == wanted.misses


def test_a_profile_of_another_model(shared_goldens, tmp_path, loader):
    Run(shared_goldens, tmp_path, "lm_top2")
    words = r"--expert-profile .*trace\.npz: must hold 8 experts' loads of encoder\.layers\.1\.moe_layer, found no such"
    with pytest.raises(ValueError, match=words):
        loader.load("mt_plain", {}, *buffered(2, "--expert-profile", tmp_path / "trace.npz"))


def test_conditional_routing_has_its_buffer_twice_in_the_state_dict(tmp_path):
    """CMR's layer stands under two names; tests/models/test_cmr.py makes the checkpoint's keys."""
    resident = language_model(moe_cmr=True).eval()
    model = language_model(seed=1, moe_cmr=True, allocate_experts=False, initialize_experts=False).eval()
    model.expert_buffer = ExpertBuffer(BufferSettings(2, "all", "lru", "ascending", "disk", tmp_path))
    model.expert_buffer.install(model.moe_layers())
    model.load_state_dict(resident.state_dict())
    model.prepare_for_inference_(commands.parse("eval_lm", "data", "--path", "x.pt", *commands.LM))
    tokens = torch.randint(4, 37, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], resident(tokens)[0])
    state = model.state_dict()
    assert set(state) == set(resident.state_dict())
    assert all(torch.equal(state[key], value) for key, value in resident.state_dict().items())
