"""Placements and their file: a round trip, and one error for every malformed one."""

import json
from collections import Counter

import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.balancing.placement import (
    Placement,
    contiguous,
    experts_of_rank,
    load_placement,
    save_placement,
)

NAME = "encoder.layers.1.moe_layer"
GOOD = {"world_size": 2, "method": "by hand", "layers": {NAME: [[0], [1], [1, 0]]}}


# --- the file


@examples(40)
@given(st.data())
def test_a_round_trip(tmp_path_factory, data):
    world_size = data.draw(st.integers(1, 6))
    ranks = st.lists(st.integers(0, world_size - 1), min_size=1, unique=True).map(tuple)
    layers = st.dictionaries(st.text(min_size=1), st.lists(ranks, min_size=1, max_size=9).map(tuple), min_size=1)
    placement = Placement(world_size, data.draw(layers), data.draw(st.text()))
    folder = tmp_path_factory.mktemp("placements")
    save_placement(folder / "placement.json", placement)
    assert load_placement(folder / "placement.json") == placement
    assert [file.name for file in folder.iterdir()] == ["placement.json"]


def test_the_format(tmp_path):
    file = tmp_path / "placement.json"
    save_placement(file, Placement(2, {NAME: ((0,), (1,), (1, 0))}, "by hand"))
    assert json.loads(file.read_text(encoding="utf-8")) == GOOD
    file.write_text(json.dumps({"world_size": 3, "layers": {"a": [[2]]}}))
    assert load_placement(str(file)) == Placement(3, {"a": ((2,),)}, "unknown")


def test_saving_replaces_the_file_that_was_there(tmp_path):
    file = tmp_path / "placement.json"
    save_placement(file, Placement(9, {"a": ((8,),)}))
    save_placement(file, Placement(1, {"b": ((0,),)}, "new"))
    assert load_placement(file) == Placement(1, {"b": ((0,),)}, "new")


def with_layer(layer):
    return {"world_size": 2, "layers": {NAME: layer}}


MALFORMED = [  # content, words of the error
    ("", ["not a placement file"]),
    ("not JSON", ["not a placement file"]),
    ('{"world_size": 2, "layers": ', ["not a placement file"]),
    ([], ["must be a JSON object", '"world_size"', '"layers"']),
    (None, ["must be a JSON object"]),
    ({}, ["must be a JSON object"]),
    ({"world_size": 2}, ['"layers"']),
    ({"world_size": 2, "layers": {}}, ['"layers"']),
    ({"world_size": 2, "layers": [[[0]]]}, ['"layers"']),
    ({"layers": {NAME: [[0]]}}, ["world_size must be a whole number of at least 1", "got None"]),
    ({"world_size": 0, "layers": {NAME: [[0]]}}, ["world_size", "got 0"]),
    ({"world_size": -2, "layers": {NAME: [[0]]}}, ["world_size", "got -2"]),
    ({"world_size": 2.0, "layers": {NAME: [[0]]}}, ["world_size", "got 2.0"]),
    ({"world_size": "2", "layers": {NAME: [[0]]}}, ["world_size", "got '2'"]),
    ({"world_size": True, "layers": {NAME: [[0]]}}, ["world_size", "got True"]),
    (with_layer([]), [NAME, "must be a list with the ranks of each expert"]),
    (with_layer({"0": [0]}), [NAME, "must be a list"]),
    (with_layer(1), [NAME, "must be a list"]),
    (with_layer([[0], 1]), [NAME, "expert 1 must have a list of ranks", "got 1"]),
    (with_layer([[0], ["1"]]), [NAME, "expert 1 must have a list of ranks", "['1']"]),
    (with_layer([[0.0]]), [NAME, "expert 0", "[0.0]"]),
    (with_layer([[False]]), [NAME, "expert 0", "[False]"]),
    (with_layer([[0], None]), [NAME, "expert 1", "got None"]),
    (with_layer([[0], []]), [NAME, "expert 1 must lie on at least one rank", "got none"]),
    (with_layer([[0], [1, 1]]), [NAME, "expert 1 must lie on a rank once at most", "[1, 1]"]),
    (with_layer([[0], [1], [2]]), [NAME, "expert 2 must lie on ranks 0 to 1", "got [2]"]),
    (with_layer([[0, -1]]), [NAME, "expert 0 must lie on ranks 0 to 1", "got [0, -1]"]),
]


@pytest.mark.parametrize(("content", "words"), MALFORMED)
def test_a_malformed_file_is_one_error_that_names_it(tmp_path, content, words):
    file = tmp_path / "placement.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_placement(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_no_file_a_folder_and_bytes_that_are_no_text(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "folder", "binary"):
        with pytest.raises(ValueError, match=f"{name}: not a placement file"):
            load_placement(tmp_path / name)


@examples(200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("world_size", "layers", "method", NAME)), inner, max_size=3),
        max_leaves=12,
    )
)
def test_any_json_is_a_placement_or_a_value_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    try:
        placement = load_placement(file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ")
    else:
        assert placement.layers and placement.world_size == content["world_size"]


# --- a placement and a model


@pytest.mark.parametrize(
    ("world_size", "num_experts", "fault"),
    [
        (3, {"a": 2, "b": 3}, "must be for 3 ranks, got one for 2"),
        (1, {"a": 2, "b": 3}, "must be for 1 ranks, got one for 2"),
        (2, {"a": 2}, "must name the model's 1 MoE layers; it has b, which the model lacks"),
        (2, {"a": 2, "b": 3, "c": 2}, "must name the model's 3 MoE layers; it lacks c"),
        (2, {"a": 2, "c": 3}, "must name the model's 2 MoE layers; it lacks c"),
        (2, {"a": 2, "b": 4}, "must place the 4 experts of b, got 3"),
        (2, {"a": 1, "b": 3}, "must place the 1 experts of a, got 2"),
    ],
)
def test_a_placement_for_another_model_or_another_number_of_ranks(world_size, num_experts, fault):
    placement = Placement(2, {"a": ((0,), (1,)), "b": ((0,), (1,), (1, 0))})
    placement.check_fits(2, {"a": 2, "b": 3})
    with pytest.raises(ValueError, match=fault):
        placement.check_fits(world_size, num_experts)


# --- upstream's order


@examples(100)
@given(st.integers(1, 40), st.integers(1, 40))
def test_contiguous_shares_are_rising_and_differ_by_one_at_most(num_experts, world_size):
    if world_size > num_experts:
        with pytest.raises(ValueError, match=f"{world_size} ranks, {num_experts} experts"):
            contiguous(num_experts, world_size)
        return
    placement = contiguous(num_experts, world_size)
    ranks = [rank for (rank,) in placement]
    assert ranks == sorted(ranks) and set(ranks) == set(range(world_size))
    shares = Counter(ranks)
    assert max(shares.values()) - min(shares.values()) <= 1
    assert [shares[rank] for rank in range(world_size)] == sorted(shares.values(), reverse=True)


def test_contiguous_by_hand():
    assert contiguous(8, 2) == ((0,),) * 4 + ((1,),) * 4  # as upstream's rank files
    assert contiguous(3, 3) == ((0,), (1,), (2,))
    assert contiguous(8, 3) == ((0,),) * 3 + ((1,),) * 3 + ((2,),) * 2


def test_the_experts_of_a_rank():
    placement = ((2, 0), (1,), (0,), (0, 1))
    assert [experts_of_rank(placement, rank) for rank in range(4)] == [(0, 2, 3), (1, 3), (0,), ()]
