"""A record's file: it comes back as it was, and whatever else lies there is named in one sentence."""

import io
import zipfile

import numpy as np
import pytest

from fairseq_moe_ext.recording import (
    MOST_SAMPLED,
    Choices,
    Inputs,
    LayerRecord,
    Record,
    Sample,
    load_record,
    merge_records,
    pack_record,
    save_record,
)


def layer(seed: int = 0, sampled: int = 5) -> LayerRecord:
    """Of 3 experts, D 4, F 6, K 2 and two languages."""
    numbers = np.random.default_rng(seed)
    fc1, fc2 = (
        Inputs(
            numbers.integers(1, 9, 3),
            numbers.normal(size=(3, dim)).astype(np.float32),
            numbers.random((3, dim)).astype(np.float32),
        )
        for dim in (4, 6)
    )
    choices = Choices(numbers.integers(0, 9, (2, 3)), numbers.random((2, 3)), numbers.integers(0, 3, (2, 3)))
    sample = Sample(
        np.sort(numbers.integers(0, 1 << 60, sampled).astype(np.uint64)),
        numbers.normal(size=(sampled, 4)).astype(np.float16),
        numbers.integers(0, 3, (sampled, 2)).astype(np.int32),
        numbers.integers(0, 2, sampled).astype(np.int32),
    )
    return LayerRecord(fc1, fc2, choices, sample)


def record(**layers: LayerRecord) -> Record:
    return Record(("eng", "deu"), layers or {"decoder.layers.1.moe_layer": layer()})


def arrays_of(given: Record) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(pack_record(given))) as file:
        return dict(file)


def assert_equal(found: Record, wanted: Record) -> None:
    found_arrays, arrays = arrays_of(found), arrays_of(wanted)
    assert found_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found_arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found_arrays[name], array)


def test_round_trip(tmp_path):
    wanted = record(a=layer(1), b=layer(2))
    save_record(tmp_path / "record.npz", wanted)
    assert_equal(load_record(tmp_path / "record.npz"), wanted)
    assert [file.name for file in tmp_path.iterdir()] == ["record.npz"]


def test_merged_means_are_weighted_by_rows_and_the_smallest_keys_are_kept():
    one, other = layer(1, MOST_SAMPLED), layer(2, 7)
    (merged,) = merge_records([record(a=one), record(a=other)]).layers.values()
    for part in ("fc1", "fc2"):
        first, second, both = (getattr(each, part) for each in (one, other, merged))
        rows = (first.rows[:, None] * first.mean + second.rows[:, None] * second.mean) / both.rows[:, None]
        np.testing.assert_allclose(both.mean, rows, rtol=1e-5)
        assert both.rows.tolist() == (first.rows + second.rows).tolist()
    keys = sorted([*one.sample.keys.tolist(), *other.sample.keys.tolist()])[:MOST_SAMPLED]
    assert merged.sample.keys.tolist() == keys


def changed(name: str, array: np.ndarray | None) -> bytes:
    """The file of a record with another array of that name, or without it."""
    arrays = arrays_of(record())
    if array is None:
        del arrays[name]
    else:
        arrays[name] = array
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def compressed() -> bytes:
    """Arrays that take far more than the file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array(header, np.zeros((3000, 3000), np.float32))
        archive.writestr("0_fc1_mean.npy", header.getvalue())
    return file.getvalue()


DAMAGED = {
    "truncated": (lambda: pack_record(record())[:-40], "not a record"),
    "empty": (lambda: b"", "not a record"),
    "another version": (lambda: changed("version", np.array([2])), "its version must be 1, got 2"),
    "no version": (lambda: changed("version", None), "it has no version"),
    "a missing array": (lambda: changed("0_fc2_mean", None), "it has no array 0_fc2_mean"),
    "another shape": (lambda: changed("0_fc1_mean", np.zeros((3, 5), np.float32)), r"fc1.square must be float32 .3, 5"),
    "another dtype": (lambda: changed("0_fc1_rows", np.zeros(3, np.int32)), r"fc1.rows must be int64 .3,., got int32"),
    "objects": (lambda: changed("languages", np.array([{}, {}])), "not a record"),
    "a NaN": (lambda: changed("0_fc1_mean", np.full((3, 4), np.nan, np.float32)), "must have finite means and sums"),
    "a negative count": (lambda: changed("0_choices_ends", np.full((2, 3), -1)), "no negative count"),
    "no such expert": (lambda: changed("0_sample_experts", np.full((5, 2), 3, np.int32)), "sampled experts below 3"),
    "no such language": (lambda: changed("0_sample_languages", np.full(5, 2, np.int32)), "languages below 2"),
    "other languages": (lambda: changed("languages", np.array(["x"])), "and 1 languages"),
    "twins": (lambda: changed("languages", np.array(["x", "x"])), "languages must be different"),
    "compressed": (compressed, "its arrays must take at most"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_named_in_one_sentence(what, tmp_path):
    content, message = DAMAGED[what]
    file = tmp_path / "record.npz"
    file.write_bytes(content())
    with pytest.raises(ValueError, match=message) as found:
        load_record(file)
    assert str(found.value).startswith(f"{file}: not a record (.npz as --moe-record writes it): ")
    assert "\n" not in str(found.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing.npz: not a record .*: No such file"):
        load_record(tmp_path / "missing.npz")


def test_records_of_other_models_are_not_merged():
    wide = layer()
    wide = LayerRecord(
        Inputs(wide.fc1.rows, np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32)),
        wide.fc2,
        wide.choices,
        Sample(wide.sample.keys, np.zeros((5, 8), np.float16), wide.sample.experts, wide.sample.languages),
    )
    with pytest.raises(ValueError, match=r"a has \(E, D, F\) \(3, 4, 6\) and \(3, 8, 6\)"):
        merge_records([record(a=layer()), record(a=wide)])
    with pytest.raises(ValueError, match="they have the layers a and b"):
        merge_records([record(a=layer()), record(b=layer())])
