"""A batch under dense, static, sparse static and dynamic gating, and the three scripts made of it, on tiny models."""

from __future__ import annotations

import csv

import pytest
import torch
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data

from reproduction import characterization, memory, passes, throughput
from reproduction.memory_peak import peak_bytes
from reproduction.models import Model
from reproduction.passes import DENSE, DYNAMIC, GATINGS, SPARSE, STATIC, Batches

LM_FLAGS = ("--task", "moe_language_modeling", "--tokens-per-sample", "16")
MT_FLAGS = ("--task", "moe_translation", "-s", "en", "-t", "de", "--beam", "2")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("lm")
    data = write_data(folder / "data")
    untrained_checkpoint(folder / "lm.pt", data, *LM_TRAINING)
    return Model("lm", folder / "lm.pt", data, LM_FLAGS, translates=False, rows=2)


@pytest.fixture(scope="module")
def translation(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("mt")
    data = write_data(folder / "data", ("en", "de"))
    untrained_checkpoint(folder / "mt.pt", data, *MT_TRAINING)
    return Model("mt", folder / "mt.pt", data, MT_FLAGS, translates=True, rows=2)


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    monkeypatch.setattr(passes, "ROUNDS", 1)


def options(model: Model, folder, *more: str) -> list[str]:
    files = ["--checkpoint", str(model.checkpoint), "--data", str(model.data), "--results", str(folder)]
    return [*files, f"--flags={' '.join(model.flags)}", *more]


def read_csv(file) -> list[dict[str, str]]:
    with open(file, encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_the_peak_is_of_what_lives_at_once():
    def call():
        first = torch.zeros(1000)
        del first
        return torch.zeros(500), torch.zeros(700)

    assert peak_bytes(call) == 4 * 1200
    assert peak_bytes(lambda: torch.zeros(0)) == 0


@torch.no_grad()
def test_gatings_of_a_translation_model(translation):
    batches = Batches(translation, "test", capacity_fraction=1.0)
    layers = batches._model.moe_layers()
    (layer, *_) = layers.values()
    with batches._gated(DENSE):
        assert not batches._model.moe_layers()
        dense_bytes = batches._parameter_bytes()
    assert batches._model.moe_layers() == layers
    found = {(each.stack, each.gating): each for each in batches.measure(40, GATINGS)}
    assert set(found) == {(stack, gating) for stack in ("MT encoder", "MT decoder") for gating in GATINGS}
    experts, per_expert = layer.experts.num_experts, layer.experts.expert_bytes
    for (_, gating), each in found.items():
        assert each.waste_factor == experts / 2
        assert each.rest > 0
        assert all((taken > 0) == (gating != DENSE and part != "exchange") for part, taken in each.parts.items())
        whole = dense_bytes + len(layers) * (experts - 1) * per_expert + len(layers) * layer.gate.wg.weight.nbytes
        assert each.parameter_bytes == (dense_bytes if gating == DENSE else whole)
    # every step has 40 sentences with 2 beams
    assert {each.tokens for (stack, _), each in found.items() if stack == "MT decoder"} == {80.0}
    peaks = {gating: found["MT encoder", gating].peak_bytes for gating in GATINGS}
    assert peaks[STATIC] > peaks[SPARSE] >= peaks[DYNAMIC] > 0


def test_characterization_of_a_language_model(language_model, tmp_path, capsys):
    arguments = options(language_model, tmp_path, "--batches", "2", "4", "--no-exchange")
    assert characterization.main(arguments) == 0
    rows = read_csv(tmp_path / "characterization" / "characterization.csv")
    assert [(row["batch"], row["gating"]) for row in rows] == [(batch, gating) for batch in "24" for gating in GATINGS]
    for row in rows:
        parts = [float(row[part]) for part in characterization.ALL_PARTS]
        assert sum(parts) == pytest.approx(float(row["milliseconds"]))
        assert row["stack"] == "LM"
        assert float(row["tokens"]) <= 16 * int(row["batch"])
    peak = {(row["batch"], row["gating"]): int(row["peak_bytes"]) for row in rows}
    text = (tmp_path / "characterization" / "characterization.md").read_text()
    mask = (peak["4", STATIC] - peak["4", SPARSE]) / 1e6
    assert "| lm | 4 | static | " in text and f" | {mask:.1f} | " in text
    assert {file.suffix for file in (tmp_path / "characterization").iterdir()} == {".csv", ".md", ".png"}
    capsys.readouterr()
    # memory finds all that it wants in the folder of runs
    (tmp_path / "runs" / "lm" / "passes-test-2-dense-static-sparse-static-dynamic.json").stat()
    assert memory.main(options(language_model, tmp_path, "--batches", "2", "4")) == 0
    found = read_csv(tmp_path / "memory" / "memory.csv")
    assert [(int(row["static"]), int(row["dynamic"])) for row in found] == [
        (peak[batch, STATIC], peak[batch, DYNAMIC]) for batch in "24"
    ]


@pytest.mark.slow
def test_throughput_climbs_to_the_limit(language_model, tmp_path):
    assert throughput.main(options(language_model, tmp_path)) == 0
    rows = read_csv(tmp_path / "throughput" / "throughput.csv")
    limit = int(rows[0]["limit_bytes"])
    batches = {gating: [int(row["batch"]) for row in rows if row["gating"] == gating] for gating in throughput.SERVED}
    assert batches[STATIC] == [1, 2, 4, 8]
    for gating in (SPARSE, DYNAMIC):
        last = [row for row in rows if row["gating"] == gating][-1]
        assert int(last["peak_bytes"]) > limit or int(last["batch"]) == 8 * throughput.LARGEST
    (static,) = (row for row in rows if row["gating"] == STATIC and row["batch"] == "8")
    assert int(static["peak_bytes"]) == limit


@pytest.mark.parametrize("more, words", [
    (("--batches", "0"), "--batches must be at least 1, got 0"),
    (("--capacity-fraction", "0"), "--capacity-fraction must be above 0, got 0.0"),
])
def test_what_is_refused(language_model, tmp_path, capsys, more, words):
    try:
        code = memory.main(options(language_model, tmp_path, *more))
    except SystemExit as error:
        code = error.code
    assert code == 2 and words in capsys.readouterr().err


def test_a_dense_model_is_refused(language_model, tmp_path, capsys):
    dense = tmp_path / "dense.pt"
    untrained_checkpoint(dense, language_model.data, *LM_TRAINING, "--moe-freq", "0")
    arguments = ["--checkpoint", str(dense), "--data", str(language_model.data), "--results", str(tmp_path)]
    assert memory.main([*arguments, f"--flags={' '.join(language_model.flags)}"]) == 2
    assert f"--checkpoint must have MoE layers, {dense} has none" in capsys.readouterr().err
