"""The trace: what was recorded comes back, in the smallest type, and a bad file is named."""

import numpy as np
import pytest

from fairseq_moe_ext.trace import (
    PHASES,
    PhaseTrace,
    TraceRecorder,
    halve_trace,
    load_trace,
    merge_traces,
    save_trace,
    slice_trace,
)


def record():
    recorder = TraceRecorder()
    recorder.begin_step("encoder", batch=0)
    recorder.add("encoder.layers.1.moe_layer", [3, 0, 1])
    for step in range(3):
        recorder.begin_step("decode", batch=step // 2)
        for layer in (1, 3):
            recorder.add(f"decoder.layers.{layer}.moe_layer", [step, layer, 0])
    return recorder


def test_steps_layers_and_experts():
    phases = record().trace()
    assert list(phases) == ["encoder", "decode"]  # no prefill, no entry
    assert phases["encoder"].names == ("encoder.layers.1.moe_layer",)
    assert phases["encoder"].load.tolist() == [[[3, 0, 1]]]
    decode = phases["decode"]
    assert decode.names == ("decoder.layers.1.moe_layer", "decoder.layers.3.moe_layer")
    assert decode.load.tolist() == [[[step, 1, 0], [step, 3, 0]] for step in range(3)]
    assert decode.batch.tolist() == [0, 0, 1] and decode.batch.dtype == np.int64


def test_round_trip(tmp_path):
    path = tmp_path / "trace.npz"
    phases = record().trace()
    save_trace(path, phases)
    loaded = load_trace(str(path))
    assert list(loaded) == list(phases)
    for phase, expected in phases.items():
        assert isinstance(loaded[phase], PhaseTrace)
        assert loaded[phase].names == expected.names
        for name in ("load", "batch"):
            np.testing.assert_array_equal(getattr(loaded[phase], name), getattr(expected, name))
            assert getattr(loaded[phase], name).dtype == getattr(expected, name).dtype
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]  # the temporary name is gone


def test_a_second_trace_takes_the_firsts_place(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(path, record().trace())
    recorder = TraceRecorder()
    recorder.begin_step("prefill", batch=7)
    recorder.add("layer", [1])
    save_trace(path, recorder.trace())
    assert list(load_trace(path)) == ["prefill"]


@pytest.mark.parametrize("largest, dtype", [
    (0, np.uint8), (255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32), (2**32 - 1, np.uint32),
])
def test_loads_take_the_smallest_type_that_holds_them(largest, dtype, tmp_path):
    recorder = TraceRecorder()
    recorder.begin_step("decode", batch=0)
    recorder.add("layer", [0, largest])
    save_trace(tmp_path / "trace.npz", recorder.trace())
    load = load_trace(tmp_path / "trace.npz")["decode"].load
    assert load.dtype == dtype and load.tolist() == [[[0, largest]]]


def test_steps_without_a_moe_layer_leave_no_trace():
    recorder = TraceRecorder()
    recorder.begin_step("prefill", batch=0)
    recorder.begin_step("decode", batch=0)
    recorder.begin_step("decode", batch=1)
    recorder.add("layer", [2])
    phases = recorder.trace()
    assert list(phases) == ["decode"] and phases["decode"].batch.tolist() == [1]
    assert TraceRecorder().trace() == {}


def test_a_layer_that_a_step_lacks_or_adds_had_no_tokens_elsewhere():
    recorder = TraceRecorder()
    for step in ({"a": [1, 2], "b": [3, 4]}, {"a": [5, 6]}, {"a": [7, 8], "c": [9, 10]}, {"c": [1, 1]}):
        recorder.begin_step("decode", batch=0)
        for name, load in step.items():
            recorder.add(name, load)
    found = recorder.trace()["decode"]
    assert found.names == ("a", "b", "c")
    assert found.load.tolist() == [
        [[1, 2], [3, 4], [0, 0]],
        [[5, 6], [0, 0], [0, 0]],
        [[7, 8], [0, 0], [9, 10]],
        [[0, 0], [0, 0], [1, 1]],
    ]


def test_a_layer_called_twice_in_a_step_counts_twice():
    recorder = TraceRecorder()
    recorder.begin_step("encoder", batch=0)
    recorder.add("a", [1, 2])
    recorder.add("a", [10, 20])
    assert recorder.trace()["encoder"].load.tolist() == [[[11, 22]]]


def test_ranks_that_met_their_layers_in_another_order_merge():
    parts = []
    for rank, step in enumerate(({"a": [1, 2], "b": [3, 4]}, {"b": [30, 40], "a": [10, 20]})):
        recorder = TraceRecorder()
        recorder.begin_step("decode", batch=rank)
        for name, load in step.items():
            recorder.add(name, load)
        parts.append(recorder.trace())
    merged = merge_traces(parts)["decode"]
    assert merged.names == ("a", "b") and merged.load.tolist() == [[[1, 2], [3, 4]], [[10, 20], [30, 40]]]


@pytest.mark.parametrize(("names", "experts"), [(("a", "a"), 3), (("a", "b"), 0)])
def test_layers_have_names_of_their_own_and_experts(names, experts):
    with pytest.raises(ValueError, match=f"must have names of their own, and experts, got a, . with {experts} experts"):
        PhaseTrace(names, np.zeros((1, 2, experts), np.uint8), np.zeros(1, int))


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="^phase must be one of encoder, prefill, decode, got 'training'$"):
        TraceRecorder().begin_step("training", batch=0)
    assert PHASES == ("encoder", "prefill", "decode")


def truncated(tmp_path):
    save_trace(tmp_path / "whole.npz", record().trace())
    return (tmp_path / "whole.npz").read_bytes()[:-200]


def damaged(tmp_path):
    """A byte inside the compressed data is not what it was."""
    recorder = TraceRecorder()
    recorder.begin_step("decode", batch=0)
    recorder.add("layer", list(range(2000)))
    save_trace(tmp_path / "whole.npz", recorder.trace())
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def without_the_batches(tmp_path):
    with open(tmp_path / "part.npz", "wb") as file:
        np.savez(file, decode_names=np.array(["a"]), decode_load=np.zeros((1, 1, 1)))
    return (tmp_path / "part.npz").read_bytes()


def of_another_shape(tmp_path):
    """Two names, one layer's load."""
    with open(tmp_path / "shape.npz", "wb") as file:
        load = np.zeros((1, 1, 1), dtype=np.uint8)
        np.savez(file, decode_names=np.array(["a", "b"]), decode_load=load, decode_batch=np.zeros(1, dtype=np.int64))
    return (tmp_path / "shape.npz").read_bytes()


def one_array(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    return (tmp_path / "array.npy").read_bytes()


def pickled(tmp_path):
    np.save(tmp_path / "array.npy", np.array([{}]), allow_pickle=True)
    return (tmp_path / "array.npy").read_bytes()


def another_archive(tmp_path):
    np.savez(tmp_path / "other.npz", scores=np.zeros(3))
    return (tmp_path / "other.npz").read_bytes()


@pytest.mark.parametrize("make", [
    lambda path: b"", lambda path: b"S-0\tnot a trace\n", truncated, damaged, without_the_batches,
    of_another_shape, one_array, pickled, another_archive,
], ids=[
    "empty", "text", "truncated", "damaged", "without the batches", "of another shape", "one array", "pickled",
    "another archive",
])
def test_a_bad_file_is_named(make, tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(make(tmp_path))
    with pytest.raises(ValueError, match=r"bad\.npz: not a routing trace"):
        load_trace(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.npz: not a routing trace"):
        load_trace(tmp_path / "none.npz")


def record_batches(batches, layers=("decoder.layers.1.moe_layer",), experts=3):
    """One encoder step per batch, and as many decode steps as the batch's number plus one; loads tell both."""
    recorder = TraceRecorder()
    for batch in batches:
        recorder.begin_step("encoder", batch)
        recorder.add("encoder.layers.0.moe_layer", [batch] * experts)
        for step in range(batch + 1):
            recorder.begin_step("decode", batch)
            for layer in layers:
                recorder.add(layer, [100 * batch, step, *[1] * (experts - 2)])
    return recorder.trace()


def assert_same(found, expected):
    assert list(found) == list(expected)
    for phase in expected:
        assert found[phase].names == expected[phase].names
        assert found[phase].load.dtype == expected[phase].load.dtype
        assert found[phase].batch.dtype == expected[phase].batch.dtype
        assert found[phase].load.tolist() == expected[phase].load.tolist()
        assert found[phase].batch.tolist() == expected[phase].batch.tolist()


@pytest.mark.parametrize("shards", [
    [range(7)],
    [range(0, 7, 2), range(1, 7, 2)],
    [range(4, 7), range(0, 4)],
    [[6], range(0, 6, 3), [1, 4], [2, 5], []],  # a rank without a batch
])
def test_the_ranks_traces_merge_into_the_one_ranks(shards):
    assert_same(merge_traces([record_batches(shard) for shard in shards]), record_batches(range(7)))


def test_traces_of_two_models_do_not_merge():
    ours = record_batches([0])
    with pytest.raises(ValueError, match="of one model.*3 experts in decoder.layers.1.*3 experts in decoder.layers.2"):
        merge_traces([ours, record_batches([1], layers=("decoder.layers.2.moe_layer",))])
    with pytest.raises(ValueError, match="of one model.*3 experts in encoder.*4 experts in encoder"):
        merge_traces([ours, record_batches([1], experts=4)])


def test_a_batch_belongs_to_one_rank():
    with pytest.raises(ValueError, match="must not share a batch; 2 of them hold batch 1 of the encoder phase"):
        merge_traces([record_batches([0, 1]), record_batches([1, 2])])


def test_a_slice_holds_the_batches_from_first_to_before_last():
    assert_same(slice_trace(record_batches(range(7)), 2, 5), record_batches(range(2, 5)))
    assert slice_trace(record_batches(range(7)), 7, 9) == {}


@pytest.mark.parametrize("batches, first", [(2, 1), (5, 3), (6, 3)])
def test_halves_by_batches_not_by_steps(batches, first):
    fits, tests = halve_trace(record_batches(range(10, 10 + batches)))
    for phase in ("encoder", "decode"):
        assert sorted({*fits[phase].batch.tolist()}) == list(range(10, 10 + first))
        assert sorted({*tests[phase].batch.tolist()}) == list(range(10 + first, 10 + batches))
    merged = merge_traces([tests, fits])
    assert_same(merged, record_batches(range(10, 10 + batches)))


def test_one_batch_does_not_split():
    with pytest.raises(ValueError, match="at least 2 batches, got 1 in its encoder phase"):
        halve_trace(record_batches([3]))
