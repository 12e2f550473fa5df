"""What --expert-profile says of a run's layers: of a trace, a profile and published sets, and what is refused."""

import json

import numpy as np
import pytest

from fairseq_moe_ext.buffering.eviction import Buffer
from fairseq_moe_ext.buffering.expert_profile import Languages, check_expert_profile, importance_of_layers
from fairseq_moe_ext.buffering.profile import LayerProfile, Profile, save_profile
from fairseq_moe_ext.buffering.simulation import LayerLoads, simulate
from fairseq_moe_ext.trace import PhaseTrace, save_trace

ENCODER, DECODER = "encoder.layers.1.moe_layer", "decoder.layers.1.moe_layer"
EXPERTS = {ENCODER: 4, DECODER: 4}
PAIR = Languages(("en",), ("de",))
LOADS = np.array([[[3, 0, 1, 0]], [[2, 2, 0, 0]], [[0, 0, 1, 3]], [[4, 0, 0, 0]]], np.uint8)


@pytest.fixture
def trace(tmp_path):
    phases = {
        "encoder": PhaseTrace((ENCODER,), LOADS, np.arange(4)),
        "decode": PhaseTrace((DECODER,), LOADS[:, :, ::-1], np.arange(4)),
    }
    save_trace(tmp_path / "trace.npz", phases)
    return tmp_path / "trace.npz"


@pytest.fixture
def profile(tmp_path):
    tokens = np.array([10, 6, 0])
    nothing = [np.zeros(shape, np.int64) for shape in ((3, 4), (3, 4), (4,))]  # ends, first choices, load
    encoder = LayerProfile(tokens, np.array([[1, 0.5, 0.25, 0.25], [0, 0, 1, 1], [0, 0, 0, 0]]), *nothing)
    decoder = LayerProfile(tokens[::-1], np.array([[0, 0, 0, 0], [2, 0, 0, 0.0], [0, 1, 2, 1.0]]), *nothing)
    save_profile(tmp_path / "profile.json", Profile(("en", "fr", "de"), {ENCODER: encoder, DECODER: decoder}))
    return tmp_path / "profile.json"


def test_a_traces_curve_is_what_the_simulation_misses(trace):
    check_expert_profile(trace)
    found = importance_of_layers(trace, EXPERTS, [ENCODER, DECODER], Languages((), ()))
    assert found[ENCODER].ranking() == [0, 3, 1, 2] and found[DECODER].ranking() == [3, 0, 1, 2]
    layer = LayerLoads(ENCODER, LOADS[:, 0])
    for policy, order in (("lfu", "resident-first"), ("lifo", "ascending")):
        wanted = [simulate(layer, n, order, policy, [0, 3, 1, 2]).misses for n in range(1, 5)]
        assert found[ENCODER].misses(range(4), order, policy).tolist() == wanted
    ours = LayerLoads(ENCODER, LOADS[:, 0][:, [1, 3]])
    wanted = [simulate(ours, n, "resident-first", "lfu", [1, 0]).misses for n in (1, 2)]
    assert found[ENCODER].misses([1, 3], "resident-first", "lfu").tolist() == wanted


def test_a_long_traces_curve_is_of_its_first_calls_in_proportion(trace, monkeypatch):
    monkeypatch.setattr("fairseq_moe_ext.buffering.expert_profile.MOST_TURNS", 4 * 4)
    found = importance_of_layers(trace, EXPERTS, [ENCODER], PAIR)[ENCODER]
    layer = LayerLoads(ENCODER, LOADS[:2, 0])  # 4 of 7 turns
    wanted = [simulate(layer, n, "resident-first", "lfu", [0, 3, 1, 2]).misses * 7 / 4 for n in range(1, 5)]
    assert found.misses(range(4), "resident-first", "lfu").tolist() == wanted


def test_a_profile_goes_by_source_in_the_encoder_and_by_target_in_the_decoder(profile):
    check_expert_profile(profile)
    found = importance_of_layers(profile, EXPERTS, list(EXPERTS), PAIR)
    assert found[ENCODER].ranking() == [0, 1, 2, 3] and found[DECODER].ranking() == [2, 1, 3, 0]
    np.testing.assert_allclose(found[ENCODER].misses(range(4), "", ""), [5, 2.5, 1.25, 0])
    np.testing.assert_allclose(found[ENCODER].misses([1, 3], "", ""), [1.25, 0])  # of a rank's own
    several = importance_of_layers(profile, EXPERTS, [ENCODER], Languages(("en", "fr"), ("de",)))
    assert several[ENCODER].weights.tolist() == [1, 0.5, 1.25, 1.25] and several[ENCODER].tokens == 16


def test_published_sets_are_shared_evenly(tmp_path):
    file = tmp_path / "experts.json"
    file.write_text('{"en": [1, 3, 4, 5, 7], "de": [0, 6]}')
    check_expert_profile(file)
    found = importance_of_layers(file, EXPERTS, [DECODER], PAIR)
    assert list(found) == [DECODER] and found[DECODER].weights.tolist() == [0, 0, 1, 0]
    found = importance_of_layers(file, EXPERTS, [ENCODER], PAIR)
    np.testing.assert_allclose(found[ENCODER].misses(range(4), "", ""), [0.5, 0, 0, 0])
    both = importance_of_layers(file, EXPERTS, [DECODER], Languages(("en",), ("de", "en")))
    np.testing.assert_allclose(both[DECODER].weights, [1 / 3, 1 / 3, 1, 1 / 3])


def test_other_languages_and_other_models_are_refused(profile, trace, tmp_path):
    for languages, words in (
        (Languages(("de",), ("de",)), f"it knows the languages en, fr for {ENCODER}, not 'de'"),
        (Languages((), ()), "the run must name its languages"),
    ):
        with pytest.raises(ValueError, match=words):
            importance_of_layers(profile, EXPERTS, [ENCODER], languages)
    with pytest.raises(ValueError, match=f"must hold the importance of 8 experts of {DECODER}, found 4"):
        importance_of_layers(profile, {**EXPERTS, DECODER: 8}, [DECODER], PAIR)
    with pytest.raises(ValueError, match="must hold 8 experts' loads of x, found no such layer"):
        importance_of_layers(trace, {"x": 8}, ["x"], PAIR)
    sets = tmp_path / "experts.json"
    sets.write_text(json.dumps({"en": [1], "de": [9]}))
    with pytest.raises(ValueError, match="experts.json: de must have expert numbers below the 8"):
        importance_of_layers(sets, EXPERTS, [ENCODER], PAIR)


@pytest.mark.parametrize(("text", "words"), [
    ("{}", "x: it must be an object"), ('{"layers": {}}', "x: it must have a version"), ("{", "x: not JSON"),
    ("PK", "x: not a routing trace"),
])
def test_what_is_none_of_the_kinds_is_refused(text, words, tmp_path):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=words):
        check_expert_profile(tmp_path / "x")


def test_equal_counts_go_by_the_ranking():
    """1 and 2 are used in the same batch: without a ranking the one whose turn came first goes, else the last in it."""
    for ranking, evicted in (((), 1), ([1, 2, 3], 2), ([2, 1, 3], 1)):
        buffer = Buffer(2, "lfu", "resident-first", ranking=ranking)
        buffer.run([1, 2])
        assert buffer.run([3])[0].evicted == evicted
