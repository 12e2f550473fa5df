"""Profiles: importance by its formula, the file as it was written, and whatever else lies there in one sentence."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_recording import layer, record

from fairseq_moe_ext.buffering.profile import Profile, importance, load_profile, profile_of, save_profile
from fairseq_moe_ext.buffering.published_sets import load_published_sets
from fairseq_moe_ext.command_line import main
from fairseq_moe_ext.recording import Choices, merge_records, save_record

NAME = "decoder.layers.1.moe_layer"
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "nllb_pruning" / "experts.json"


def naive_importance(choices: Choices) -> list[list[float]]:
    """Language by language, expert by expert: the share of first choices times e to the mean probability."""
    found = []
    for first, confidence in zip(choices.first.tolist(), choices.confidence.tolist(), strict=True):
        row = []
        for count, gained in zip(first, confidence, strict=True):
            row.append(count / sum(first) * math.exp(gained / count) if count else 0.0)
        found.append(row)
    return found


def test_importance_is_the_share_of_first_choices_times_e_to_the_confidence():
    first = np.array([[3, 0, 1], [0, 0, 0]])
    choices = Choices(first, np.array([[1.5, 0, 1.0], [0, 0, 0]]), np.zeros((2, 3), np.int64))
    wanted = [[0.75 * math.exp(0.5), 0, 0.25 * math.exp(1)], [0, 0, 0]]
    np.testing.assert_allclose(importance(choices), wanted, rtol=1e-12)
    for seed in range(5):
        choices = layer(seed).choices
        np.testing.assert_allclose(importance(choices), naive_importance(choices), rtol=1e-12)


def assert_equal(found: Profile, wanted: Profile) -> None:
    assert found.languages == wanted.languages and found.layers.keys() == wanted.layers.keys()
    for name, each in wanted.layers.items():
        for field in ("tokens", "importance", "ends", "first", "load"):
            one, other = getattr(found.layers[name], field), getattr(each, field)
            assert one.dtype == other.dtype and np.array_equal(one, other)


def test_round_trip(tmp_path):
    wanted = profile_of(record(a=layer(1), b=layer(2)))
    save_profile(tmp_path / "profile.json", wanted)
    assert_equal(load_profile(tmp_path / "profile.json"), wanted)


def test_several_languages_are_their_sum_and_others_are_refused_with_the_known_ones():
    given = layer(3)
    first = given.choices.first.copy()
    first[1] = 0
    profile = profile_of(record(**{NAME: replace(given, choices=replace(given.choices, first=first)), "b": layer(4)}))
    both = profile.layers["b"].importance
    np.testing.assert_array_equal(profile.of_languages("b", ("deu", "eng")), both[1] + both[0])
    assert profile.languages_of(NAME) == ("eng",)
    with pytest.raises(ValueError, match=f"no tokens of 'deu' in {NAME}, only of eng"):
        profile.of_languages(NAME, ("deu",))


def test_the_command_merges_records(tmp_path, capsys):
    records = [record(**{NAME: layer(1)}), record(**{NAME: layer(2)})]
    for number, each in enumerate(records):
        save_record(tmp_path / f"{number}.npz", each)
    output = tmp_path / "profile.json"
    assert main(["profile", str(tmp_path / "0.npz"), str(tmp_path / "1.npz"), "--output", str(output)]) == 0
    assert_equal(load_profile(output), profile_of(merge_records(records)))
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == "layer language tokens experts 90% in all in".split()
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["eng", "deu"]


def test_the_command_refuses_what_is_no_record(tmp_path, capsys):
    (tmp_path / "x.npz").write_text("x")
    assert main(["profile", str(tmp_path / "x.npz"), "--output", str(tmp_path / "profile.json")]) == 2
    assert "x.npz: not a record" in capsys.readouterr().err and not (tmp_path / "profile.json").exists()


def content() -> dict:
    layer = {"tokens": [4, 0], "importance": [[0.5, 1.5], [0, 0]], "ends": [[1, 0], [0, 0]]}
    layer |= {"first": [[1, 3], [0, 0]], "load": [4, 3]}
    return {"version": 1, "languages": ["en", "de"], "layers": {NAME: layer}}


def spoiled(*path, value):
    found = place = content()
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return found


DAMAGED = {
    "a list": ([], "it must have a version"),
    "more": ({**content(), "x": 1}, "and nothing else"),
    "version": (spoiled("version", value=2), "its version must be 1, got 2"),
    "true": (spoiled("version", value=True), "its version must be 1, got True"),
    "no language": (spoiled("languages", value=[]), "languages must be a list of 1 to"),
    "a number": (spoiled("languages", value=["en", 3]), "languages must be a list"),
    "twins": (spoiled("languages", value=["en", "en"]), "each of its languages must stand there once"),
    "no layer": (spoiled("layers", value={}), "layers must be 1 to"),
    "a field": (spoiled("layers", NAME, value={"tokens": [1, 1]}), "must have tokens, importance, ends"),
    "tokens": (spoiled("layers", NAME, "tokens", value=[1]), "a whole number of tokens for each of 2"),
    "negative": (spoiled("layers", NAME, "tokens", value=[1, -1]), "a whole number of tokens for each of 2"),
    "rows": (spoiled("layers", NAME, "ends", value=[[1, 0]]), "ends of .* for each of 2 languages"),
    "ragged": (spoiled("layers", NAME, "importance", value=[[0.5], [0.5, 1]]), "as many in every language"),
    "text": (spoiled("layers", NAME, "importance", value=[["a", 1], [0, 1]]), "finite numbers from 0 on"),
    "too much": (spoiled("layers", NAME, "importance", value=[[1e300, 1], [0, 1]]), "finite numbers from 0 on"),
    "no expert": (spoiled("layers", NAME, "importance", value=[[], []]), "must have importance, ends and first"),
    "shapes": (spoiled("layers", NAME, "ends", value=[[1], [1]]), "must have importance, ends and first"),
    "load": (spoiled("layers", NAME, "load", value=[1, -1]), "load must be a whole number for each expert"),
    "loads": (spoiled("layers", NAME, "load", value=[1]), "must have importance, ends and first"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_profile_is_named_in_one_sentence(what, tmp_path):
    given, message = DAMAGED[what]
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message) as found:
        load_profile(file)
    assert str(found.value).startswith(f"{file}: not a profile") and "\n" not in str(found.value)


TWO = {"decoder.layers.0": 2, "encoder.layers.3": 4, "encoder.layers.1": 3}


def test_published_numbers_count_the_encoders_experts_first(tmp_path):
    file = tmp_path / "experts.json"
    file.write_text('{"en": [0, 2, 3, 6, 8], "de": [7]}')
    wanted = {"encoder.layers.3": (0, 2, 3), "encoder.layers.1": (2,), "decoder.layers.0": (1,)}
    nothing = {"encoder.layers.3": (), "encoder.layers.1": (), "decoder.layers.0": (0,)}
    assert load_published_sets(file, TWO) == {"en": wanted, "de": nothing}


@pytest.mark.parametrize(("text", "message"), [
    ("[]", "an object of expert numbers"), ("{}", "an object"), ('{"en": []}', "en must have a list"),
    ('{"en": [1.5]}', "whole ones"), ('{"en": [true]}', "whole ones"), ('{"en": [-1]}', "whole ones"),
    ('{"en": [2, 1]}', "rising"), ('{"en": [1, 1]}', "rising"), ('{"en": [9]}', "below the 9 of the model's 3"),
    ("{", "not JSON"),
])
def test_damaged_sets_are_named_in_one_sentence(text, message, tmp_path):
    file = tmp_path / "experts.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as found:
        load_published_sets(file, TWO)
    assert str(found.value).startswith(f"{file}: not sets of experts") and "\n" not in str(found.value)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published sets are not beside the checkout")
def test_the_published_sets_of_nllb():
    names = [f"{side}.layers.{number}.moe_layer" for side in ("encoder", "decoder") for number in range(3, 24, 4)]
    sets = load_published_sets(PUBLISHED, dict.fromkeys(names, 128))
    assert len(sets) == 202
    for kept in sets.values():
        assert [len(kept[name]) for name in names] == [36] * 6 + [12] * 6
