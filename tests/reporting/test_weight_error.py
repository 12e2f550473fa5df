"""What the report says of quantised weights: their experts' error against the floats, on the run's first rows."""

import json

import commands
import pytest
import torch
from buffer_makers import buffered
from rank_commands import arguments_of
from served_models import Loader

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.kernels.offsets import Offsets
from fairseq_moe_ext.reporting.weight_error import LayerSample, WeightError
from fairseq_moe_ext.tasks.flags import check_flags

QUICK = ("--beam", 1, "--batch-size", 40, "--max-len-b", 4)
STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "1.0")
MEASURED = {name: ("--moe-weights", name, "--moe-report-weight-error", 64) for name in ("int8", "int4")}
BOUNDS = {"int8": (0.002, 0.02), "int4": (0.03, 0.2)}


def served(goldens, folder, *flags):
    """The run's hypotheses and its report's layers."""
    flags = (*QUICK, "--moe-report", folder / "report.json", *flags)
    lines = commands.generate(*arguments_of(goldens, "mt_plain", *flags)).lines
    report = json.loads((folder / "report.json").read_text())
    return [line for line in lines if line[:2] in ("H-", "P-")], report["layers"]


@pytest.fixture(scope="module")
def resident(shared_goldens, tmp_path_factory):
    return {name: served(shared_goldens, tmp_path_factory.mktemp(name), *flags) for name, flags in MEASURED.items()}


@pytest.mark.parametrize("name", BOUNDS)
def test_every_layer_has_its_error_and_no_result_changes(resident, shared_goldens, tmp_path, name):
    lines, layers = resident[name]
    without, quiet = served(shared_goldens, tmp_path, "--moe-weights", name)
    assert lines == without
    assert not any("weight_error" in layer for layer in quiet)
    least, most = BOUNDS[name]
    for layer in layers:
        assert layer["weight_error"]["rows"] == 64 < layer["assignments"]
        assert least < layer["weight_error"]["relative"] < most


@pytest.mark.parametrize("store", [(), ("--expert-store", "disk", "--expert-store-dir")], ids=["host", "disk"])
def test_a_buffer_has_the_same_errors(resident, shared_goldens, tmp_path, store):
    store = (*store, tmp_path / "store") if store else ()
    _, layers = served(shared_goldens, tmp_path, *MEASURED["int4"], *buffered(2, *store))
    assert [layer["weight_error"] for layer in layers] == [layer["weight_error"] for layer in resident["int4"][1]]


def test_slots_that_static_gating_fills_up_are_nobodys_rows(shared_goldens, tmp_path):
    """Every slot holds a token's row or zeros; the bias alone would be right to 0.1%."""
    _, layers = served(shared_goldens, tmp_path, *MEASURED["int4"][:-1], 10**6, *STATIC)
    for layer in layers:
        assert 0 < layer["weight_error"]["rows"] <= sum(layer["load"])
        assert 0.03 < layer["weight_error"]["relative"] < 0.2


def test_a_program_has_it_at_any_time(shared_goldens, tmp_path):
    folder = shared_goldens / "mt_plain"
    options = {"cpu": True, "moe_weights": "int8", "moe_report": tmp_path / "report.json"}
    with moe.load(folder / "checkpoint_merged.pt", folder / "data-bin", moe_report_weight_error=10**6, **options) as it:
        rows = []
        for _ in range(2):
            it.translate(["a b c", "d"])
            report = it.report()
            rows.append([layer["weight_error"]["rows"] for layer in report["layers"]])
            assert rows[-1] == [sum(layer["load"]) for layer in report["layers"]]
        assert it.report()["layers"] == report["layers"]
    assert rows[0] < rows[1]


@torch.no_grad()
@pytest.mark.parametrize("by_row_ids", [False, True])
def test_a_sample_is_the_naive_comparison(shared_goldens, by_row_ids):
    """Over two calls, of which the second has more rows than are wanted; a row of zeros and one of NaN are no rows."""
    loader = Loader(shared_goldens)
    exact = loader.load("mt_plain", {}).encoder.layers[1].moe_layer.experts
    state = read_checkpoint(str(shared_goldens / "mt_plain" / "checkpoint_merged.pt"))["model"]
    experts = loader.load("mt_plain", {}, "--moe-weights", "int4").encoder.layers[1].moe_layer.experts
    keys = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    prefix = "encoder.layers.1.moe_layer.experts"
    weights = [[state[f"{prefix}.{expert}.{key}"] for key in keys] for expert in range(8)]
    sample = LayerSample(weights, experts.activation, 20)
    assert sample.compare() == WeightError() and sample.compare().relative == 0
    experts.observe(sample)
    generator = torch.Generator().manual_seed(0)
    counts = [3, 0, 2, 0, 1, 1, 0, 3], [10, 0, 0, 0, 7, 0, 0, 9]
    rows = [torch.randn(sum(each) + 4, exact.model_dim, generator=generator) for each in counts]
    rows[0][2], rows[0][4] = 0, torch.nan
    wanted = [torch.tensor([0, 1, 3, 5, 6, 7, 8, 9]), torch.arange(12) * 26 // 12]
    error = output = 0.0
    for each, its, numbers in zip(counts, rows, wanted, strict=True):
        ids = torch.randperm(len(its), generator=generator)[: sum(each)] if by_row_ids else None
        given = its
        if by_row_ids:
            given = torch.empty_like(its)
            given[ids] = its[: sum(each)]
        offsets = Offsets.of_counts(each)
        found = experts.run(given, offsets, ids)[numbers]
        float_outputs = exact.run(its[: sum(each)].nan_to_num(), offsets)[numbers]
        error += (found - float_outputs).double().square().sum().item()
        output += float_outputs.double().square().sum().item()
    compared = sample.compare()
    assert compared.rows == 20
    assert compared.relative == pytest.approx((error / output) ** 0.5, rel=1e-4)
    assert sample.compare() == compared


@pytest.mark.parametrize("flags, words", [
    (("--moe-weights", "int8"), "--moe-report-weight-error needs --moe-report, got 9 without it"),
    (("--moe-report", "r.json"), "--moe-report-weight-error needs --moe-weights int8 or int4, got 9 with float"),
])
def test_what_it_needs(flags, words):
    arguments = ("data", "--path", "x.pt", *commands.LM, *flags, "--moe-report-weight-error", "9")
    with pytest.raises(ValueError, match=f"^{words}"):
        check_flags(commands.parse("eval_lm", *arguments).task)


@pytest.mark.parametrize("rows", ["0", "-3", "all", "2.5"])
def test_a_number_of_rows_that_is_none(rows):
    flags = ("--moe-weights", "int8", "--moe-report", "r.json", f"--moe-report-weight-error={rows}")
    with pytest.raises(ValueError, match=f"^--moe-report-weight-error must be a whole number .*, got '{rows}'"):
        check_flags(commands.parse("eval_lm", "data", "--path", "x.pt", *commands.LM, *flags).task)
