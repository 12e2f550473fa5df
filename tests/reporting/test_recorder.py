"""`--moe-record`: what it says of a run is what the run's gates and experts were given; the run stays as it was."""

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from python_served import lines_of
from record_twin import heard_gates

import fairseq_moe_ext as moe
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.experts.watched_inputs import WatchedInputs
from fairseq_moe_ext.recording import (
    MOST_CALLS,
    MOST_HIDDEN,
    MOST_SAMPLED,
    Record,
    load_record,
    merge_records,
    pack_record,
)
from fairseq_moe_ext.reporting.recorder import Recorder

WORDS, SHORT = ("--remove-bpe", "none"), ("--max-len-a", 0, "--max-len-b", 8)
LM = (*commands.LM, "--tokens-per-sample", 16, "--batch-size", 8)
ACTIVATIONS = {"tiny_lm_top2": F.gelu, "tiny_nllb": F.relu}
SCORED = (*commands.NLLB, "-t", "de", *WORDS, "--batch-size", 8, "--score-reference")


def arguments(folder, *flags) -> tuple:
    return folder / "data-bin", "--path", folder / "checkpoint_last.pt", *flags


@pytest.fixture(scope="module")
def lm(tiny_goldens, tmp_path_factory):
    """Of fairseq-eval-lm: what it found without a record and what its gates were given, what it found with one, and
    the record."""
    folder = tiny_goldens / "tiny_lm_top2"
    with heard_gates(folder / "checkpoint_last.pt") as heard:
        plain = commands.eval_lm(*arguments(folder, *LM))
    file = tmp_path_factory.mktemp("lm") / "record.npz"
    recorded = commands.eval_lm(*arguments(folder, *LM, "--moe-record", file))
    return plain, heard, recorded, load_record(file)


@pytest.fixture(scope="module")
def scored(tiny_goldens, tmp_path_factory):
    """The same of fairseq-generate with --score-reference, of a multilingual model."""
    folder = tiny_goldens / "tiny_nllb"
    with heard_gates(folder / "checkpoint_last.pt") as heard:
        plain = commands.generate(*arguments(folder, *SCORED))
    file = tmp_path_factory.mktemp("scored") / "record.npz"
    recorded = commands.generate(*arguments(folder, *SCORED, "--moe-record", file))
    return plain, heard, recorded, load_record(file)


@pytest.fixture(params=["lm", "scored"])
def run(request):
    return request.getfixturevalue(request.param)


def assert_same_batches(found: list, wanted: list) -> None:
    assert len(found) == len(wanted) > 0
    for batch, expected in zip(found, wanted, strict=True):
        assert batch.ids == expected.ids
        for row, other in zip(batch.scores, expected.scores, strict=True):
            assert np.array_equal(row, other)


def test_results_are_bit_for_bit_those_of_a_run_without(run):
    plain, _, recorded, _ = run
    assert_same_batches(recorded.batches, plain.batches)


def test_fc1s_inputs_are_all_rows_of_every_expert(run):
    _, heard, _, record = run
    assert list(record.layers) == sorted(heard.calls, key=list(record.layers).index)
    for name, layer in record.layers.items():
        for expert in range(layer.num_experts):
            rows = torch.cat(heard.rows(name, expert)).double()
            assert layer.fc1.rows[expert] == len(rows) > 0
            np.testing.assert_allclose(layer.fc1.mean[expert], rows.mean(0), atol=1e-5)
            np.testing.assert_allclose(layer.fc1.square[expert], rows.square().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lm", "scored"])
def test_fc2s_inputs_are_the_first_rows_of_every_expert(kind, request):
    _, heard, _, record = request.getfixturevalue(kind)
    activation = ACTIVATIONS["tiny_lm_top2" if kind == "lm" else "tiny_nllb"]
    for name, layer in record.layers.items():
        for expert in range(layer.num_experts):
            hidden = heard.hidden(name, expert, activation).double()
            assert layer.fc2.rows[expert] == len(hidden) <= MOST_HIDDEN
            np.testing.assert_allclose(layer.fc2.mean[expert], hidden.mean(0), atol=1e-5)
            np.testing.assert_allclose(layer.fc2.square[expert], hidden.square().mean(0), rtol=1e-4, atol=1e-5)


def test_first_choices_and_confidence_are_of_tokens_that_are_no_padding(run):
    _, heard, _, record = run
    for name, layer in record.layers.items():
        first, confidence = heard.first_choices(name)
        language = record.languages.index(language_of(record, name))
        assert layer.choices.first[language].tolist() == torch.bincount(first, minlength=layer.num_experts).tolist()
        wanted = torch.zeros(layer.num_experts).index_add_(0, first, confidence)
        np.testing.assert_allclose(layer.choices.confidence[language], wanted, rtol=1e-4)
        others = np.delete(layer.choices.first, language, axis=0)
        assert others.sum() == 0


def language_of(record: Record, name: str) -> str:
    """That a layer's tokens are counted for."""
    return record.languages[0 if len(record.languages) == 1 or name.startswith("encoder.") else 1]


def test_a_language_model_has_one_language_without_a_name(lm):
    assert lm[3].languages == ("",)


def test_a_translations_encoder_counts_its_source_and_its_decoder_its_target(scored):
    *_, record = scored
    assert record.languages == ("en", "de")
    for name, layer in record.layers.items():
        assert (layer.choices.first.sum(1) > 0).tolist() == [name.startswith("encoder."), name.startswith("decoder.")]


def test_a_language_models_sentences_end_where_its_data_does(lm):
    plain, heard, _, record = lm
    blocks = {}
    for batch in plain.batches:
        blocks |= zip(batch.ids, batch.net_input["src_tokens"], strict=True)
    text = torch.cat([row[row != 1] for _, row in sorted(blocks.items())])
    lengths = [len(row[row != 1]) for _, row in sorted(blocks.items())]
    ends = dict(zip(sorted(blocks), torch.cat((text[1:], torch.tensor([2]))).eq(2).split(lengths), strict=True))
    for name, layer in record.layers.items():
        places = []
        for batch in plain.batches:
            place = torch.zeros(batch.net_input["src_tokens"].shape, dtype=torch.bool)
            for row, number in enumerate(batch.ids):
                place[row, : len(ends[number])] = ends[number]
            places.append(place.view(-1))
        assert layer.choices.ends[0].tolist() == heard.firsts_at(name, places).tolist()
        assert layer.choices.ends.sum() == text.eq(2).sum() > 0


def test_a_scored_translation_ends_at_its_last_token(scored):
    plain, heard, _, record = scored
    for name, layer in record.layers.items():
        if name.startswith("encoder."):
            assert layer.choices.ends.sum() == 0
            continue
        places = []
        for batch in plain.batches:
            tokens = batch.net_input["prev_output_tokens"]
            place = torch.zeros(tokens.shape, dtype=torch.bool)
            for row, length in enumerate(tokens.ne(1).sum(1).tolist()):
                place[row, length - 1] = True
            places.append(place.view(-1))
        assert layer.choices.ends[1].tolist() == heard.firsts_at(name, places).tolist()


def test_the_sample_is_of_tokens_that_the_gate_had_and_the_same_in_every_layer_of_a_stack(run):
    _, heard, _, record = run
    keys = {}
    for name, layer in record.layers.items():
        calls = heard.calls[name]
        tokens = torch.cat([tokens[real] for tokens, real, _ in calls]).half()
        chosen = torch.cat([routing.expert_ids[real] for _, real, routing in calls])
        known: dict[bytes, list] = {}
        for each, its in zip(tokens, chosen, strict=True):
            known.setdefault(each.numpy().tobytes(), []).append(its.tolist())
        sample = layer.sample
        assert len(sample.keys) == min(len(tokens), 2048) and (np.diff(sample.keys.astype(float)) >= 0).all()
        for inputs, experts in zip(sample.inputs, sample.experts.tolist(), strict=True):
            assert experts in known[inputs.tobytes()]
        keys.setdefault(name.split(".")[0], []).append(sample.keys.tolist())
    assert all(each == of_stack[0] for of_stack in keys.values() for each in of_stack)


# --- searches


@pytest.fixture(scope="module")
def translations(tiny_goldens):
    """A multilingual model that translates by beam search into two languages, and then scores what it found: the record
    after each."""
    folder = tiny_goldens / "tiny_nllb"
    file = folder / "searched.npz"
    options = {"source_lang": "en", "target_lang": "de", "cpu": True, "moe_record": str(file)}
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **options) as served:
        lines, records = lines_of(served)[:24], []
        found = {each: served.generate(lines, beam=3, nbest=3, max_len_b=12, target_lang=each) for each in ("de", "fr")}
        records.append(served._parts.observer.record.record())
        for language, hypotheses in found.items():
            pairs = [(line, each.words) for line, its in zip(lines, hypotheses, strict=True) for each in its]
            served.score(*map(list, zip(*pairs, strict=True)), target_lang=language)
        records.append(served._parts.observer.record.record())
    return len(lines), records, load_record(file)


def decoder_of(record: Record):
    return next(layer for name, layer in record.layers.items() if name.startswith("decoder."))


def test_hypotheses_of_a_beam_search_end_where_scoring_them_ends(translations):
    """By expert: a row of the search that ends is the row whose first choice is counted."""
    sentences, (searched, both), _ = translations
    assert searched.languages == both.languages == ("en", "de", "fr")
    before, after = decoder_of(searched).choices.ends, decoder_of(both).choices.ends
    assert before.sum(1).tolist() == [0, 3 * sentences, 3 * sentences]  # hypotheses that are kept
    assert (after - before).tolist() == before.tolist()


def test_languages_are_counted_apart(translations):
    _, (searched, _), written = translations
    encoder = next(layer for name, layer in searched.layers.items() if name.startswith("encoder."))
    assert (encoder.choices.first.sum(1) > 0).tolist() == [True, False, False]
    assert (decoder_of(searched).choices.first.sum(1) > 0).tolist() == [False, True, True]
    assert set(decoder_of(written).sample.languages.tolist()) == {1, 2}
    assert set(encoder.sample.languages.tolist()) == {0}


def test_continuous_batching_ends_the_same_hypotheses(tiny_goldens, tmp_path):
    found = []
    for flags in ((), ("--continuous-batching",)):
        file = tmp_path / f"record{len(found)}.npz"
        of_search = (*commands.NLLB, "-t", "fr", *WORDS, *SHORT, "--batch-size", 8, "--moe-record", file)
        commands.generate(*arguments(tiny_goldens / "tiny_nllb", *of_search, *flags))
        found.append(decoder_of(load_record(file)).choices.ends)
    assert found[0].sum() > 0 and found[1].tolist() == found[0].tolist()


def test_beams_that_ended_while_others_sample_on_are_not_counted(tiny_goldens):
    """A beam's tokens without its end are as many as its sentence had steps while it lived."""
    folder = tiny_goldens / "tiny_nllb"
    options = {"source_lang": "en", "target_lang": "de", "cpu": True, "moe_record": str(folder / "sampled.npz")}
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **options) as served:
        found = served.generate(lines_of(served)[:24], beam=2, nbest=2, sampling=True, seed=3, max_len_b=12)
        record = served._parts.observer.record.record()
    choices = decoder_of(record).choices
    lived = sum(len(each.positional_scores) for its in found for each in its)
    assert len({len(each.positional_scores) for its in found for each in its}) > 1
    assert choices.first.sum() == lived
    assert choices.ends.sum() == sum(map(len, found))


# --- where experts lie


def assert_same_record(found: Record, wanted: Record, exact: bool = True) -> None:
    """exact: sums of the same rows in the same order."""
    rtol, atol = (0, 0) if exact else (1e-4, 1e-5)
    assert found.languages == wanted.languages and list(found.layers) == list(wanted.layers)
    for name, layer in wanted.layers.items():
        other = found.layers[name]
        for part in ("fc1", "fc2"):
            a, b = getattr(other, part), getattr(layer, part)
            assert part == "fc2" and not exact or a.rows.tolist() == b.rows.tolist()
            if part == "fc1" or exact:
                np.testing.assert_allclose(a.mean, b.mean, rtol=rtol, atol=atol)
                np.testing.assert_allclose(a.square, b.square, rtol=rtol, atol=atol)
        assert other.choices.first.tolist() == layer.choices.first.tolist()
        assert other.choices.ends.tolist() == layer.choices.ends.tolist()
        np.testing.assert_allclose(other.choices.confidence, layer.choices.confidence, rtol=1e-5)
        assert other.sample.keys.tolist() == layer.sample.keys.tolist()
        np.testing.assert_allclose(other.sample.inputs, layer.sample.inputs, rtol=2e-3, atol=2e-3)


def test_experts_in_a_buffer_have_the_same_record(lm, tiny_goldens, tmp_path):
    flags = ("--moe-record", tmp_path / "record.npz", "--expert-buffer-size", 2, "--expert-store", "disk")
    commands.eval_lm(*arguments(tiny_goldens / "tiny_lm_top2", *LM, *flags))
    assert_same_record(load_record(tmp_path / "record.npz"), lm[3])


def test_quantised_experts_have_a_record_near_the_floats(lm, tiny_goldens, tmp_path):
    flags = ("--moe-record", tmp_path / "record.npz", "--moe-weights", "int8")
    commands.eval_lm(*arguments(tiny_goldens / "tiny_lm_top2", *LM, *flags))
    found, wanted = load_record(tmp_path / "record.npz"), lm[3]
    for name, layer in wanted.layers.items():
        assert abs(found.layers[name].fc2.square - layer.fc2.square).max() < 0.2 * layer.fc2.square.max()
        assert found.layers[name].fc1.rows.sum() == layer.fc1.rows.sum()


def test_two_ranks_write_the_record_of_one(lm, tiny_goldens, tmp_path):
    file = tmp_path / "record.npz"
    commands.run("eval-lm", *arguments(tiny_goldens / "tiny_lm_top2", *LM, "--moe-record", file), ranks=2)
    assert_same_record(load_record(file), lm[3], exact=False)


# --- the file


def recorded(calls: int) -> tuple:
    """A layer's calls of 5 rows of 40 positions: the record, and what its gate and experts are given and computed."""
    case = Case(rows=5, positions=40)
    layer = case.layer()
    layer.prepare_for_serving(0)
    recorder = Recorder("record.npz", 2, ("", ""))
    recorder.attach({"decoder.layers.0.moe_layer": layer})
    real = torch.ones(5, 40, dtype=torch.bool)
    with torch.no_grad():
        for call in range(calls):
            x, _ = case.with_(seed=call).batch()
            recorder.begin_pass("decoder", call, real.long(), real, False)
            layer(x)
            recorder.end_pass()
    return recorder.record(), layer, [case.with_(seed=call).batch()[0] for call in range(calls)]


def test_the_record_does_not_grow_with_what_was_served():
    """Both bounds are met: of sampled tokens, and of calls or rows whose hidden features are computed again."""
    sizes = []
    for calls in (12, 20):
        record, layer, batches = recorded(calls)
        (found,) = record.layers.values()
        sizes.append(len(pack_record(record)))
        assert found.fc1.rows.sum() == 2 * 200 * calls and len(found.sample.keys) == MOST_SAMPLED < 200 * calls
        assert found.fc2.rows.max() == MOST_HIDDEN and (found.fc2.rows <= MOST_HIDDEN).all()
        tokens = torch.cat([x.reshape(-1, x.size(2)) for x in batches])
        np.testing.assert_allclose(found.fc1.rows @ found.fc1.mean, 2 * tokens.double().sum(0), rtol=1e-3, atol=1)
    assert sizes[0] == sizes[1]


def test_few_rows_a_call_have_their_hidden_features_computed_in_few_calls():
    watched = WatchedInputs(2, 3, 4, (0, 1), torch.relu)
    experts = ResidentExperts(2, 3, 4, torch.relu).eval()
    experts.watch(watched)
    with torch.no_grad():
        for _ in range(3 * MOST_CALLS):
            experts(torch.ones(1, 3), [0, 1])
    fc1, fc2 = watched.result()
    assert fc1.rows.tolist() == [0, 3 * MOST_CALLS] and fc2.rows.tolist() == [0, MOST_CALLS]
    np.testing.assert_allclose(fc1.mean[1], np.ones(3), rtol=1e-6)


def test_a_pass_that_breaks_off_counts_no_token():
    case = Case()
    layer, (x, _) = case.layer(), case.batch()
    layer.prepare_for_serving(0)
    recorder = Recorder("record.npz", 2, ("", ""))
    recorder.attach({"decoder.layers.0.moe_layer": layer})
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    for finish in (recorder.drop_pass, recorder.end_pass):
        recorder.begin_pass("decoder", 0, real.long(), real, False)
        with torch.no_grad():
            layer(x)
        finish()
    (found,) = recorder.record().layers.values()
    assert found.choices.first.sum() == len(found.sample.keys) == x.shape[0] * x.shape[1]


def test_the_languages_of_several_records_are_put_together():
    one, other = (Record(("a", "b"), recorded(1)[0].layers), Record(("b", "c"), recorded(1)[0].layers))
    wide = [
        Record(each.languages, {name: layer.for_languages([place], 2) for name, layer in each.layers.items()})
        for place, each in enumerate((one, other))
    ]
    merged = merge_records(wide)
    (layer,) = merged.layers.values()
    assert merged.languages == ("a", "b", "c")
    assert layer.choices.first.sum(1).tolist() == [200, 0, 200]
    assert set(layer.sample.languages.tolist()) == {0, 2}


def test_merged_records_are_that_of_both_runs(lm, scored):
    *_, record = lm
    both = merge_records([record, record])
    for name, layer in record.layers.items():
        assert both.layers[name].fc1.rows.tolist() == (2 * layer.fc1.rows).tolist()
        np.testing.assert_allclose(both.layers[name].fc1.mean, layer.fc1.mean, rtol=1e-6)
        assert both.layers[name].choices.first.tolist() == (2 * layer.choices.first).tolist()
    with pytest.raises(ValueError, match="must be of one model"):
        merge_records([record, scored[3]])


@pytest.mark.parametrize("flags, message", [
    (("--moe-gating", "static"), "--moe-record must go with --moe-gating dynamic, got .*record.npz with static gating"),
    (("--moe-trace", "record.npz"), "--moe-trace and --moe-record must name two files"),
])
def test_what_cannot_be_recorded_is_refused(flags, message, tiny_goldens, tmp_path):
    file = tmp_path / "record.npz"
    flags = [file if flag == "record.npz" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        commands.eval_lm(*arguments(tiny_goldens / "tiny_lm_top2", *LM, "--moe-record", file, *flags))


def test_an_engine_has_no_record(tiny_goldens, tmp_path):
    folder, options = tiny_goldens / "tiny_mt", {"cpu": True, "moe_record": str(tmp_path / "record.npz")}
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **options) as served:
        with pytest.raises(ValueError, match="engine.. must be asked for without moe_record"):
            served.engine()
