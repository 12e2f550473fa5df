"""The disk store's file: what other tools read of it, and every way in which it can be wrong."""

import errno
import logging
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import safetensors
import torch
from buffer_makers import assert_file_serves, weights_of
from cases import examples
from full_disk import full_at
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_ext.buffering import expert_file
from fairseq_moe_ext.buffering.expert_file import ExpertFile, open_or_build, other_files, store_file
from fairseq_moe_ext.buffering.store import FileStore, StoreError
from fairseq_moe_ext.experts.parts import EXPERT_KEYS

HELD = (1, 4)


@pytest.fixture
def built(tmp_path) -> Path:
    open_or_build(tmp_path / "x.safetensors", HELD, weights_of(2), "one")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_safetensors_library_reads_it(tmp_path, dtype):
    weights = weights_of(2, dtype)
    path = tmp_path / "new" / "folder" / "x.safetensors"
    open_or_build(path, HELD, weights, "one")
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["fingerprint"] == "one"
        names = [f"{expert}.{key}" for expert in HELD for key in EXPERT_KEYS.values()]
        assert sorted(file.keys()) == sorted(names)
        for name, part in zip(names, [part for parts in weights for part in parts], strict=True):
            assert torch.equal(file.get_tensor(name), part)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_it_is_built_once(built, caplog):
    before = built.stat()
    with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
        file = open_or_build(built, HELD, weights_of(2), "one")
    assert built.stat().st_mtime_ns == before.st_mtime_ns and built.stat().st_ino == before.st_ino
    assert f"experts are read from {built}" in caplog.text
    assert_file_serves(file, weights_of(2))


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 5)


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"12345")


def overwrite(path: Path, data: bytes, offset: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


WRONG = {
    "truncated": (truncate, "must have them, found"),
    "lengthened": (lengthen, "must have them, found"),
    "empty": (lambda path: path.write_bytes(b""), "not an expert store"),
    "text": (lambda path: path.write_text("no store " * 20), "not an expert store: its header is cut off"),
    "damaged header": (lambda path: overwrite(path, b"{}[", 8), "not an expert store"),
    "no metadata": (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}"), "not an expert store"),
    "a list": (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "not an expert store"),
    "too few checksums": (lambda path: overwrite(path, b"         ", path.read_bytes().index(b'"crc32": "') + 10),
                          "another checkpoint or other experts"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_built_anew(built, wrong, caplog):
    damage, words = WRONG[wrong]
    damage(built)
    with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
        file = open_or_build(built, HELD, weights_of(2), "one")
    assert "built anew" in caplog.text and words in caplog.text
    assert_file_serves(file, weights_of(2))


@pytest.mark.parametrize(("held", "dtype", "fingerprint"), [
    (HELD, torch.float32, "two"), ((1, 5), torch.float32, "one"), (HELD, torch.float16, "one"),
])
def test_a_file_of_something_else_is_built_anew(built, held, dtype, fingerprint):
    other = weights_of(2, dtype, seed=1)
    assert_file_serves(open_or_build(built, held, other, fingerprint), other)


@pytest.fixture
def read_only(tmp_path):
    """A folder that cannot be written; root may write anywhere, so there it is one that is a file."""
    folder = tmp_path / "folder"
    if os.geteuid() == 0:
        folder.write_text("a file")
        return folder
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    return folder


def test_a_folder_that_cannot_be_written(read_only):
    with pytest.raises(StoreError, match=r"x\.safetensors: the expert store cannot be written: .*--expert-store-dir"):
        open_or_build(read_only / "x.safetensors", HELD, weights_of(2), "one")


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path):
    huge = [[torch.zeros(1).expand(1 << 50) for _ in EXPERT_KEYS] for _ in HELD]
    with pytest.raises(StoreError, match=r"No space left on device: \d+ bytes needed, \d+ free; --expert-store-dir"):
        open_or_build(tmp_path / "x.safetensors", HELD, huge, "one")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_building(tmp_path):
    with full_at(700), pytest.raises(StoreError, match=r"x\.safetensors: the expert store cannot be written: File too"):
        open_or_build(tmp_path / "x.safetensors", HELD, weights_of(2), "one")
    assert list(tmp_path.iterdir()) == []


def test_a_stale_file_that_cannot_be_replaced_is_refused(built):
    with full_at(700), pytest.raises(StoreError, match=r"File too large \(.*another checkpoint.*\); --expert"):
        open_or_build(built, HELD, weights_of(2), "two")
    assert_file_serves(open_or_build(built, HELD, weights_of(2), "one"), weights_of(2))


def test_a_process_without_room_takes_what_another_has_built(tmp_path, monkeypatch):
    """The other one's file gets its name while this one fails."""
    path = tmp_path / "x.safetensors"

    def fails(*_):
        monkeypatch.undo()
        open_or_build(path, HELD, weights_of(2), "one")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(expert_file, "_build", fails)
    assert_file_serves(open_or_build(path, HELD, weights_of(2), "one"), weights_of(2))


def build_with_others(path: Path, number: int, start, results) -> None:
    start.wait()
    for attempt in range(5):
        fingerprint = f"{attempt}" * 64
        weights = weights_of(2, seed=attempt)
        file = open_or_build(store_file(path, "x", fingerprint), HELD, weights, fingerprint)
        assert_file_serves(file, weights)
    results.put(number)


def test_several_processes_build_at_once(tmp_path):
    """Five files, one after another: whoever comes first, each is whole and all processes are served."""
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=build_with_others, args=(tmp_path, n, start, results)) for n in range(4)]
    for process in processes:
        process.start()
    start.set()
    assert sorted(results.get(timeout=60) for _ in processes) == [0, 1, 2, 3]
    for process in processes:
        process.join()
    assert len(list(tmp_path.iterdir())) == 5


def test_what_lies_beside_a_file(tmp_path):
    mine, other = (store_file(tmp_path, "X.layer", digit * 64) for digit in "ab")
    names = ["X.layer.safetensors", f"{mine.name}.{'0' * 16}.tmp", other.name]
    for name in [mine.name, *names, "Y.layer.safetensors", "X.layer.0123abcd.safetensors", "X.layer.pt",
                 f"X.layer.0123abcd.{'a' * 16}.safetensors"]:
        (tmp_path / name).write_bytes(b"")
    assert other_files(tmp_path, "X.layer", mine) == sorted(tmp_path / name for name in names)


def read_all(file: ExpertFile, weights) -> None:
    for expert, parts in enumerate(weights):
        FileStore(file, torch.float32).load(expert, [torch.empty_like(part) for part in parts])


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    overwrite(path, bytes([data[-1] ^ 1]), len(data) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_damaged_values_are_never_served(built, dtype):
    """Before it is opened, and after."""
    flip_last_byte(built)
    file = open_or_build(built, HELD, weights_of(2), "one")
    targets = [torch.empty_like(part, dtype=dtype) for part in weights_of(2)[1]]
    FileStore(file, dtype).load(0, targets)
    with pytest.raises(StoreError, match=r"x\.safetensors: the expert store is damaged: 4\.fc2\.bias"):
        FileStore(file, dtype).load(1, targets)
    built.unlink()
    file = open_or_build(built, HELD, weights_of(2), "one")
    read_all(file, weights_of(2))
    flip_last_byte(built)
    with pytest.raises(StoreError, match="was changed while it was in use"):
        read_all(file, weights_of(2))


@examples(200)
@given(st.integers(0, 10_000), st.integers(1, 255), st.booleans())
def test_no_single_damaged_byte_is_served(tmp_path_factory, place, change, opened_before):
    """Wherever it is: the right values, or an error."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.unlink(missing_ok=True)
    file = open_or_build(path, HELD, weights_of(2), "one")
    data = bytearray(path.read_bytes())
    place %= len(data)
    overwrite(path, bytes([data[place] ^ change]), place)
    try:
        assert_file_serves(file if opened_before else open_or_build(path, HELD, weights_of(2), "one"), weights_of(2))
    except StoreError as error:
        assert "is damaged" in str(error) or "was changed" in str(error)


def test_cut_off_while_serving(built):
    file = open_or_build(built, HELD, weights_of(2), "one")
    built.write_bytes(b"")
    with pytest.raises(StoreError, match="can no longer be read: it ends"):
        read_all(file, weights_of(2))


def test_deleted_while_serving(built):
    """The open file stays: nothing is lost until it is closed."""
    file = open_or_build(built, HELD, weights_of(2), "one")
    built.unlink()
    assert_file_serves(file, weights_of(2))
