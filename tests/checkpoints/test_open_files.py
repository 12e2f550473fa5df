"""Few of a checkpoint's files are open at a time, and a thread reads from the right one until it is done."""

from __future__ import annotations

import copy
import gc
import os
import threading

import pytest
import torch
from checkpoint_makers import proving_state, split, whole

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.open_files import LIMIT, OpenFiles, ReopenedFile

FILES = 3 * LIMIT


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    state = proving_state(FILES)
    split(state, FILES, folder)
    return folder / "X.pt", state


def test_a_checkpoint_of_many_rank_files_has_few_of_them_open(checkpoint):
    path, wanted = checkpoint
    before = descriptors()
    state = read_checkpoint(str(path))["model"]
    assert before < descriptors() <= before + LIMIT
    for key in reversed(state):
        assert torch.equal(state[key].read(), wanted[key])
    assert descriptors() <= before + LIMIT
    loading = state.loading
    assert copy.deepcopy(loading) is loading
    del state
    assert descriptors() == before  # also while the model still tells of its loading


def test_threads_read_more_files_than_are_open(checkpoint):
    path, wanted = checkpoint
    before, state = descriptors(), read_checkpoint(str(path))["model"]
    keys = [key for key in state if "fc1.weight" in key]
    wrong = []

    def read(seed: int) -> None:
        for number in torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist():
            if not torch.equal(state[keys[number]].read(), wanted[keys[number]]):
                wrong.append(keys[number])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and descriptors() <= before + LIMIT
    assert state.loading.bytes == 4 * sum(wanted[key].nbytes for key in keys)


def test_a_reader_keeps_its_file_when_others_take_its_place(tmp_path):
    files, paths = OpenFiles(limit=1), [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(path.name.encode())
    first, second = (ReopenedFile(path, files) for path in paths)
    held = first.descriptor()
    other = second.descriptor()
    assert first.opened is None and second.opened is other
    assert (os.pread(held.number, 1, 0), os.pread(other.number, 1, 0)) == (b"a", b"b")
    number = held.number
    del held
    with pytest.raises(OSError):
        os.fstat(number)
    assert os.pread(first.descriptor().number, 1, 0) == b"a"


def replace(path):
    (path.parent / "new").write_bytes(path.read_bytes())
    os.utime(path.parent / "new", ns=(0, path.stat().st_mtime_ns + 1))
    os.replace(path.parent / "new", path)


@pytest.mark.parametrize(("change", "words"), [
    (os.unlink, "must stay while it is in use: No such file"),
    (replace, "was changed while it was in use"),
    (lambda path: os.truncate(path, 40), "was changed while it was in use"),
])
def test_a_file_that_is_opened_again_must_be_the_same(tmp_path, change, words):
    state = proving_state(FILES)
    files = split(state, FILES, tmp_path)
    found = read_checkpoint(str(tmp_path / "X.pt"))["model"]
    change(files[0])
    with pytest.raises(CheckpointError, match=rf"X-rank-0\.pt: the file {words}"):
        found["decoder.layers.1.moe_layer.experts.0.fc1.weight"].read()


def test_a_file_that_is_no_checkpoint_stays_open_for_nobody(tmp_path):
    before = descriptors()
    torch.save(whole(proving_state(2)), tmp_path / "X.pt")
    content = (tmp_path / "X.pt").read_bytes()
    (tmp_path / "X.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        read_checkpoint(str(tmp_path / "X.pt"))
    assert descriptors() == before
