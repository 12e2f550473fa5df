"""Values that are no numbers: a warning names dtype and layer, the report counts them, and no result hides them."""

import json
import logging
import math

import commands
import pytest
import torch
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data
from fairseq import search
from model_makers import dictionary

from fairseq_moe_ext.reporting.finite import FiniteSearch, NotFiniteError, PassOutputs, Results
from fairseq_moe_ext.reporting.observer import Observer
from fairseq_moe_ext.reporting.totals import LayerTotals

LM = ("--task", "moe_language_modeling", "--gen-subset", "test", "--tokens-per-sample", "16", *commands.LM[-3:])
MT = ("--task", "moe_translation", "--gen-subset", "test", "-s", "en", "-t", "de", "--max-len-b", "10")
EXPERT = 4  # of the translation model's encoder: some sentences have a word that goes to it, some have none
MT = (*MT, "--beam", "3", "--batch-size", "8", *commands.LM[-3:])


def overflowing(file, data, *training, layer: str, expert: int = 0, change=lambda weight: weight * 3e4):
    """A checkpoint in which one expert of the MoE layer called `layer` goes beyond float16's range."""
    untrained_checkpoint(file, data, *training)
    state = commands.read_state(file)
    key = f"{layer}.moe_layer.experts.{expert}.fc2.weight"
    state["model"][key] = change(state["model"][key])
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    data = write_data(folder / "data")
    return data, "--path", overflowing(folder / "x.pt", data, *LM_TRAINING, layer="decoder.layers.3")


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mt")
    data = write_data(folder / "data", ("en", "de"))
    return data, "--path", overflowing(folder / "x.pt", data, *MT_TRAINING, layer="encoder.layers.1", expert=EXPERT)


def told(report) -> dict:
    return json.loads(report.read_text())["non_finite"]


@pytest.mark.parametrize("flags", [("--moe-dtype", "float16"), ("--fp16",)], ids=" ".join)
def test_a_loss_that_is_no_number_ends_eval_lm(lm, tmp_path, caplog, flags):
    report = tmp_path / "report.json"
    with pytest.raises(NotFiniteError, match=r"of 10 results are not numbers .*float16.* first in decoder\.layers\.3"):
        commands.eval_lm(*lm, *LM, *flags, "--moe-report", report)
    found = told(report)
    assert found["first_layer"] == "decoder.layers.3" and found["passes"] >= 1 and found["results"] >= 1
    assert found["beams"] == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("float16" in line and "decoder.layers.3" in line for line in warnings) == 1


@pytest.mark.parametrize("flags", [(), ("--moe-dtype", "bfloat16")], ids=" ".join)
def test_the_same_model_is_served_in_a_dtype_that_holds_its_values(lm, tmp_path, caplog, flags):
    assert math.isfinite(commands.eval_lm(*lm, *LM, *flags, "--moe-report", tmp_path / "report.json").loss)
    assert told(tmp_path / "report.json") == {"passes": 0, "first_layer": None, "beams": 0, "results": 0}
    assert "not finite" not in caplog.text


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_float32_overflow_names_the_first_layer(tmp_path, value):
    data = write_data(tmp_path / "data")
    change = {"change": lambda weight: weight.fill_(float(value))}
    path = overflowing(tmp_path / "x.pt", data, *LM_TRAINING, layer="decoder.layers.1", **change)
    with pytest.raises(NotFiniteError, match=r"float32 are not finite, first in decoder\.layers\.1"):
        commands.eval_lm(data, "--path", path, *LM)


def test_a_dense_models_dtype_is_named(tmp_path):
    data, file, report = write_data(tmp_path / "data"), tmp_path / "x.pt", tmp_path / "report.json"
    untrained_checkpoint(file, data, *LM_TRAINING, "--moe-freq", "0")
    state = commands.read_state(file)
    state["model"]["decoder.layers.1.fc2.weight"].fill_(3e4)
    torch.save(state, file)
    with pytest.raises(NotFiniteError, match="values in float16 are not finite; float32, without --fp16, has"):
        commands.eval_lm(data, "--path", file, *LM, "--fp16", "--moe-report", report)
    assert json.loads(report.read_text())["dtype"] == "float16"


def test_broken_beams_name_the_last_layer_unless_the_model_is_dense():
    observer = Observer("dynamic")
    observer.count_broken_beams(1)
    assert observer.report.non_finite.first_layer is None  # nothing is known of a dense model's layers
    observer.report.layers["decoder.layers.1.moe_layer"] = LayerTotals("decoder.layers.1.moe_layer")
    observer.count_broken_beams(1)
    assert observer.report.non_finite.first_layer == "decoder.output_projection"


@pytest.mark.parametrize("flags", [(), ("--sampling",), ("--continuous-batching",), ("--beam", "1")], ids=" ".join)
def test_a_translation_that_is_no_number_is_given_out_as_such(mt, tmp_path, capfd, flags):
    """Every sentence has its lines, those of whole sentences as in float32; then the command fails."""
    results = tmp_path / "results"
    arguments = (*mt, *MT, "--moe-dtype", "float16", "--moe-report", tmp_path / "report.json")
    with pytest.raises(NotFiniteError, match=r"of 20 results are not numbers .*float16.* first in encoder\.layers\.1"):
        commands.generate(*arguments, *flags)
    assert not results.exists()
    found = told(tmp_path / "report.json")
    assert found["first_layer"] == "encoder.layers.1" and found["beams"] >= found["results"] >= 1


def test_a_sentence_that_is_not_finite_leaves_the_others_hypotheses_as_they_are(mt, tmp_path):
    whole = commands.generate(*mt, *MT)
    cfg = commands.parse("generate", *mt, *MT, "--moe-dtype", "float16")
    assert cfg.task.moe_dtype == "float16"
    output = []
    with pytest.raises(NotFiniteError):
        commands.generate_command._main(cfg, _Lines(output))
    broken = commands.Generation("".join(output).splitlines())
    assert [number for number, _ in broken.of_kind("H")] == [number for number, _ in whole.of_kind("H")]
    pairs = list(zip(broken.of_kind("H"), whole.of_kind("H"), strict=True))
    numbers = [math.isfinite(float(fields[0])) for (_, fields), _ in pairs]
    assert 0 < sum(numbers) < len(numbers)
    for (_, ours), (_, wanted) in pairs:
        if math.isfinite(float(ours[0])):
            assert float(ours[0]) == pytest.approx(float(wanted[0]), abs=0.05)


class _Lines(list):
    def __init__(self, lines):
        self.write, self.flush = lines.append, lambda: None


def test_two_ranks_tell_what_one_tells(mt, tmp_path):
    flags = ("--moe-dtype", "float16", "--moe-report", tmp_path / "report.json")
    done = commands.run("generate", *mt, *MT, *flags, ranks=2, check=False)
    assert done.returncode != 0
    with pytest.raises(NotFiniteError) as error:
        commands.generate(*mt, *MT, "--moe-dtype", "float16", "--moe-report", tmp_path / "one.json")
    assert str(error.value) in done.stderr
    assert done.stderr.count("WARNING:fairseq_moe_ext:values in float16") == 1
    assert told(tmp_path / "report.json") == told(tmp_path / "one.json")


def test_interactive_goes_on_and_fails_at_its_end(mt, tmp_path):
    data, *_ = mt
    path = ("--path", overflowing(tmp_path / "x.pt", data, *MT_TRAINING, layer="encoder.layers.1"))
    words = dictionary(40).symbols[4:]
    lines = "\n".join(" ".join(words[start : start + 6]) for start in range(0, 30, 3)) + "\n"
    flags = ("--task", "moe_translation", "-s", "en", "-t", "de", "--max-len-b", "10", "--cpu")
    done = commands.run("interactive", data, *path, *flags, "--moe-dtype", "float16", stdin=lines, check=False)
    assert done.returncode == 1 and "first in encoder.layers.1" in done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines() if line.startswith("H-")] == [
        f"H-{number}" for number in range(10)
    ]


def test_the_first_layer_at_a_real_position_counts():
    outputs = PassOutputs()
    real = torch.tensor([[True, True], [True, False]])  # (B, L)
    first, second = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)  # (L, B, D)
    first[1, 1, 0] = math.nan  # padding
    outputs.add("first", first)
    outputs.add("second", second)
    assert outputs.first_not_finite(real) is None
    second[1, 0, 2] = -math.inf
    outputs.add("first", first)
    outputs.add("second", second)
    assert outputs.first_not_finite(real) == "second"
    assert outputs.first_not_finite(real) is None  # each pass begins anew


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_beyond_the_dtypes_range_is_no_alarm(dtype):
    outputs = PassOutputs()
    outputs.add("layer", torch.full((1, 1, 512), 60_000.0, dtype=dtype))
    assert outputs.first_not_finite() is None


def test_a_sentence_without_a_hypothesis_is_no_result():
    results = Results()
    whole = [{"positional_scores": torch.tensor([-1.0, -2.0])}]
    assert results.add([whole, [], [{"positional_scores": torch.tensor([-math.inf])}]], [7, 8, 9]) == 2
    with pytest.raises(NotFiniteError, match=r"2 of 3 results are not numbers \(sentence 8, 9\): why"):
        results.check("why")


class _Model:
    def __init__(self, *rows):
        self.rows = torch.tensor(rows)

    def forward_decoder(self):
        return self.rows.clone(), None


@pytest.mark.parametrize("strategy", [search.BeamSearch, search.Sampling])
def test_only_rows_that_are_no_numbers_are_changed(strategy):
    generator = type("Generator", (), {"eos": 1, "search": strategy(dictionary(3))})()
    generator.model = _Model([-1.0, -2.0, -3.0], [math.nan] * 3)
    finite = FiniteSearch(generator)
    with finite.around():
        rows, _ = generator.model.forward_decoder()
    assert rows[0].tolist() == [-1.0, -2.0, -3.0]
    assert rows[1].isfinite().all() and rows[1].argmax() == 1 and rows[1].exp().isfinite().all()
    assert (finite.count(), finite.count()) == (1, 0)
    sums = torch.stack((torch.tensor(-1.0), rows[1, 0], torch.tensor(-2.0))).cumsum(0)  # a word, a broken row, a word
    ((kept,),) = finite.without_broken([[{"positional_scores": sums.diff(prepend=sums.new_zeros(1))}]])
    assert kept["positional_scores"].tolist()[0] == -1 and kept["positional_scores"][1:].isnan().all()
    assert generator.model.forward_decoder()[0].isnan().any()  # outside the context nothing is replaced
    with pytest.raises(torch.OutOfMemoryError), finite.around():
        generator.model.forward_decoder()
        raise torch.OutOfMemoryError
    assert finite.count() == 0  # whoever meets the error may try again
