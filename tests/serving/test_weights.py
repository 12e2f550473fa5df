"""Served models with quantised experts: the same results wherever the experts lie, close to the floats' own."""

import json
import logging
import re
from itertools import product

import commands
import pytest
import torch
from buffer_makers import buffered
from model_makers import language_model
from served_models import EVERY_MODEL, Loader, logits

import fairseq_moe_ext as moe
from fairseq_moe_ext.buffering.eviction import ORDERS, POLICIES
from fairseq_moe_ext.experts.formats import QUANTIZED, format_named
from fairseq_moe_ext.serving.expert_share import share_experts
from fairseq_moe_ext.tasks.flags import check_flags

STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.3")
HALVES = (("--moe-dtype", "float16"), ("--moe-dtype", "bfloat16"))


def weights(name: str) -> tuple[str, str]:
    return "--moe-weights", name


@pytest.fixture(scope="module")
def loader(shared_goldens):
    return Loader(shared_goldens)


def unless(chosen: tuple, *lists) -> list:
    """All combinations; those that are not chosen are slow."""
    return [each if each in chosen else pytest.param(*each, marks=pytest.mark.slow) for each in product(*lists)]


QUICK = (("int8", "lm_top2", 2, "host"), ("int4", "mt_plain", 2, "built"), ("int4", "mt_nllb_ws2", 7, "host"))


@pytest.mark.parametrize(
    ("name", "model", "size", "store"), unless(QUICK, QUANTIZED, EVERY_MODEL, (2, 7), ("host", "built"))
)
def test_a_buffer_changes_no_bit(loader, name, model, size, store, tmp_path):
    flags = ("--expert-store", "disk", "--expert-store-dir", str(tmp_path)) if store == "built" else ()
    found = loader.logits(model, {}, *weights(name), *buffered(size, *flags))
    assert torch.equal(found, loader.logits(model, {}, *weights(name)))
    assert not torch.equal(found, loader.logits(model, {}))
    files = [file.name for file in tmp_path.iterdir()]
    assert len(files) == (2 if store == "built" else 0) and all(f".{name}." in file for file in files)


PAIRS = tuple(("int8", policy, order) for policy, order in zip(POLICIES, ORDERS * 2, strict=True))


@pytest.mark.parametrize(("name", "policy", "order"), unless(PAIRS, QUANTIZED, POLICIES, ORDERS))
def test_every_policy_and_order(loader, name, policy, order):
    flags = buffered(3, "--expert-eviction", policy, "--expert-order", order)
    assert torch.equal(
        loader.logits("mt_plain", {}, *weights(name), *flags), loader.logits("mt_plain", {}, *weights(name))
    )


WAYS = (("int8", "lm_top2", STATIC), ("int4", "lm_top2", HALVES[0]), ("int8", "mt_plain", HALVES[1]))


@pytest.mark.parametrize(
    ("name", "model", "how"), unless(WAYS, QUANTIZED, ("lm_top2", "mt_plain"), (STATIC, *HALVES))
)
def test_static_gating_and_every_dtype(loader, name, model, how):
    found = loader.logits(model, {}, *how, *weights(name))
    assert torch.equal(loader.logits(model, {}, *how, *weights(name), *buffered(2)), found)
    assert not torch.equal(found, loader.logits(model, {}, *how))


@pytest.mark.parametrize("name", QUANTIZED)
def test_fairseqs_own_half_precision_is_the_plugins(shared_goldens, name):
    """fairseq halves the model when its weights are there, --moe-dtype before: the same blocks."""
    folder = shared_goldens / "mt_plain"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_merged.pt", *commands.MT, *weights(name))
    blocks = []
    for flags in ((), ("--fp16",), ("--moe-dtype", "bfloat16")):
        model, _ = commands.load("generate", *arguments, *flags)
        if "--fp16" in flags:
            model.half()
        experts = [layer.experts for layer in model.moe_layers().values()]
        blocks.append(torch.cat([each.blocks for each in experts]))
        assert {each.dtype for each in experts} == {next(model.parameters()).dtype}
    assert all(torch.equal(each, blocks[0]) for each in blocks)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_reference_mode_is_close(loader, name):
    found = loader.logits("mt_plain", {}, *weights(name))
    widened = loader.logits("mt_plain", {}, *weights(name), "--moe-kernel", "loop")
    torch.testing.assert_close(found, widened, rtol=0.05, atol=0.1 if name == "int8" else 0.2)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("choice", ["plain", "off"])
def test_any_cpu_serves_them(loader, monkeypatch, name, choice):
    """A rounding may move a code, and a token to another expert: most values stay."""
    expected = loader.logits("mt_plain", {}, *weights(name))
    monkeypatch.setenv("FAIRSEQ_MOE_CPU_KERNEL", choice)
    found = logits(loader.load("mt_plain", {}, *weights(name)))
    assert found.isfinite().all() and (found - expected).abs().median() < 1e-3


@pytest.mark.parametrize("name", QUANTIZED)
def test_report_and_log_know_the_format_and_its_bytes(shared_goldens, tmp_path, name, caplog):
    folder = shared_goldens / "mt_plain"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_merged.pt", *commands.MT, "--score-reference")
    telling = ("--moe-report", tmp_path / "report.json")
    with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
        commands.generate(*arguments, *telling, *weights(name), *buffered(3))
    report = json.loads((tmp_path / "report.json").read_text())
    model, _ = commands.load("generate", *arguments)
    experts = [layer.experts for layer in model.moe_layers().values()]
    sizes = [format_named(name, each.model_dim, each.hidden_dim).expert_bytes(torch.float32) for each in experts]
    assert (report["expert_format"], report["dtype"]) == (name, "float32")
    assert report["memory"]["expert_bytes_total"] == 8 * sum(sizes)
    assert report["memory"]["expert_bytes_resident"] == 5 * sum(sizes)
    floats = sum(each.total_bytes for each in experts)
    assert report["memory"]["expert_bytes_total"] < floats / (3 if name == "int8" else 5)
    for layer, size in zip(report["layers"], sizes, strict=True):
        assert layer["bytes_copied"] == layer["misses"] * size > 0
    line = rf"experts in {name} \({8 * sum(sizes) / 2**20:.1f} MiB\) are computed by .*quantized.*, float32 on cpu"
    assert re.search(line, caplog.text)


@pytest.mark.parametrize("name", QUANTIZED)
def test_from_python(shared_goldens, name):
    folder = shared_goldens / "mt_plain"
    path, data = folder / "checkpoint_merged.pt", folder / "data-bin"
    lines = ["a b c", "d"]
    with moe.load(path, data, cpu=True, moe_weights=name) as served:
        first, report = served.translate(lines, beam=2), served.report()
    with moe.load(path, data, cpu=True, moe_weights=name, expert_buffer_size=2) as served:
        assert served.translate(lines, beam=2) == first
    assert report["expert_format"] == name


def broken(shared_goldens, folder, value):
    state = commands.read_state(shared_goldens / "mt_plain" / "checkpoint_merged.pt")
    key = "decoder.layers.1.moe_layer.experts.5.fc2.weight"
    state["model"][key] = state["model"][key].clone()
    state["model"][key][3, 4] = value
    torch.save(state, folder / "X.pt")
    return folder / "X.pt", key


@pytest.mark.parametrize("flags", [(), buffered(2), buffered(2, "--expert-store", "disk")], ids=["", "host", "disk"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(loader, shared_goldens, tmp_path, flags, value):
    path, key = broken(shared_goldens, tmp_path, value)
    if "disk" in flags:
        flags = (*flags, "--expert-store-dir", str(tmp_path / "store"))
    with pytest.raises(ValueError, match=f"^{key}: weights must be finite numbers to be quantised"):
        loader.load("mt_plain", {}, *weights("int8"), *flags, path=path)
    files = [file.name for file in tmp_path.rglob("*decoder*")]
    assert files == []  # nothing is left of a store that could not be written


@pytest.mark.parametrize("flags, words", [
    (("--moe-kernel", "triton"), "--moe-kernel must be auto or loop with --moe-weights int8, got triton"),
    (("--moe-kernel", "grouped-mm"), "--moe-kernel must be auto or loop with --moe-weights int8, got grouped-mm"),
    (buffered(2, "--expert-store", "disk"), "--moe-weights int8 with --expert-store disk needs --expert-store-dir"),
])
@pytest.mark.grouped_mm
def test_what_cannot_take_effect_is_refused_before_anything_is_loaded(flags, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        check_flags(commands.parse("eval_lm", "data", "--path", "x.pt", *commands.LM, *weights("int8"), *flags).task)


def test_a_built_store_is_quantised_once_and_is_of_one_format(loader, tmp_path, caplog):
    flags = buffered(2, "--expert-store", "disk", "--expert-store-dir", tmp_path)
    for name, written in (("int8", 2), ("int4", 2), ("int8", 0), ("float", 2), ("int4", 0)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
            found = logits(loader.load("mt_plain", {}, *weights(name), *flags))
        assert torch.equal(found, loader.logits("mt_plain", {}, *weights(name)))
        assert caplog.text.count("experts were written to") == written
        assert "may be deleted" not in caplog.text
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_layer_out_of_scope_or_smaller_than_its_buffer_is_resident(loader, name):
    wanted = loader.logits("mt_plain", {}, *weights(name))
    for flags in (buffered(9), buffered(2, "--expert-buffer-scope", "encoder")):
        assert torch.equal(loader.logits("mt_plain", {}, *weights(name), *flags), wanted)


def test_conditional_routing_has_its_layer_twice_in_the_state_dict():
    resident = language_model(moe_cmr=True).eval()
    model = language_model(seed=1, moe_cmr=True, allocate_experts=False, initialize_experts=False).eval()
    share_experts(model, None, {}, weights="int8")
    model.load_state_dict(resident.state_dict())
    tokens = torch.randint(4, 37, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(tokens)[0], resident(tokens)[0]
    assert 0 < (found - expected).abs().max() < 0.02


def test_retained_dropout_of_the_experts_is_refused(shared_goldens):
    model, _ = commands.load(
        "generate", shared_goldens / "mt_plain" / "data-bin", "--path",
        shared_goldens / "mt_plain" / "checkpoint_merged.pt", *commands.MT, *weights("int4"),
    )
    for module in model.modules():
        if hasattr(module, "experts_dropout"):
            module.experts_dropout.p, module.experts_dropout.apply_during_inference = 0.1, True
    cfg = commands.parse("generate", "data", "--path", "x.pt", *commands.MT, "--retain-dropout")
    with pytest.raises(ValueError, match="--retain-dropout .* quantised ones do not have: it must go without --moe-we"):
        model.prepare_for_inference_(cfg)
