"""Conversions that meet in one target: real processes; one writes it whole, the others say so and fail."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import hf_makers
import pytest
import torch
from checkpoint_makers import assert_same_state, proving_state, whole

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.conversion_lock import only_writer
from fairseq_moe_ext.checkpoints.convert import merge, split
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.export import export_hf

fork = multiprocessing.get_context("fork")
ROUNDS = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with hf/, NLLB's layout, x.pt, the same converted, and moe.pt; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    hf_makers.write_model(folder / "hf")
    convert_nllb(str(folder / "hf"), str(folder / "x.pt"))
    torch.save(whole(proving_state(4)), folder / "moe.pt")
    return folder


# name -> (what it calls, its target's name, what is read back)
CONVERSIONS = {
    "from NLLB": (lambda made, target, force: convert_nllb(f"{made}/hf", target, force=force), "new.pt", "new.pt"),
    "to NLLB": (lambda made, target, force: export_hf(f"{made}/x.pt", target, tokenizer=f"{made}/hf"), "new", "new"),
    "merge": (lambda made, target, force: merge(f"{made}/moe.pt", target, True, force), "new.pt", "new.pt"),
    "split": (lambda made, target, force: split(f"{made}/moe.pt", target, 2, True, force), "new.pt", "new-rank-0.pt"),
}


def _attempt(convert: Callable, made: Path, target: str, force: bool, barrier, answers) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    try:
        convert(made, target, force)
        answers.put("")
    except CheckpointError as error:
        answers.put(str(error))


def check_is_whole(name: str, made: Path, found: Path) -> None:
    if name == "to NLLB":
        check = found.parent / "check.pt"
        convert_nllb(str(found), str(check))
        found, wanted = check, made / "x.pt"
    else:
        wanted = made / ("x.pt" if name == "from NLLB" else "moe.pt")
    tensors = [read_checkpoint(str(file))["model"] for file in (found, wanted)]
    assert_same_state(tensors[0], {key: tensor.read() for key, tensor in tensors[1].items()})


@pytest.mark.parametrize(
    ("name", "force"),
    [(name, force) for name in CONVERSIONS for force in (False, True) if name != "to NLLB" or not force],  # has none
)
def test_conversions_that_start_together(made, tmp_path, name, force):
    convert, target, result = CONVERSIONS[name]
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        barrier, answers = fork.Barrier(3), fork.SimpleQueue()
        arguments = (convert, made, str(folder / target), force, barrier, answers)
        processes = [fork.Process(target=_attempt, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        said = sorted(answers.get() for _ in processes)
        for process in processes:
            process.join()
        done = [each for each in said if not each]
        assert len(done) == 1 or force and done
        for each in said[len(done) :]:
            assert each == f"another conversion writes {folder / target}" or "exists already" in each and not force
        check_is_whole(name, made, folder / result)
        left = [file.name for file in folder.iterdir() if file.suffix in (".lock", ".partial", ".tmp", ".json")]
        assert left == []


@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_conversion_asks_for_the_lock(made, tmp_path, name):
    """Under whichever name the target is reached."""
    convert, target, _ = CONVERSIONS[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with only_writer(tmp_path / "folder" / target):
        for path in (tmp_path / "folder" / target, tmp_path / "link" / target):
            with pytest.raises(CheckpointError, match=f"^another conversion writes {path}$"):
                convert(made, str(path), False)
        assert os.listdir(tmp_path / "folder") == [f"{target}.lock"]
    convert(made, str(tmp_path / "link" / target), False)


def _hold(target: Path, held) -> None:
    with only_writer(target):
        held.set()
        signal.pause()


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    target, held = tmp_path / "x.pt", fork.Event()
    process = fork.Process(target=_hold, args=(target, held))
    process.start()
    held.wait()
    with pytest.raises(CheckpointError, match="another conversion writes"), only_writer(target):
        pass
    process.kill()
    process.join()
    with only_writer(target):
        pass
    assert os.listdir(tmp_path) == []


def _take_turns(target: Path, inside: Path) -> None:
    """Hold the lock 20 times; the file `inside` is there while anybody holds it."""
    taken = 0
    while taken < 20:
        try:
            with only_writer(target):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                os.unlink(inside)
                taken += 1
        except CheckpointError:
            pass


def test_the_lock_is_one_processs_though_its_file_comes_and_goes(tmp_path):
    processes = [fork.Process(target=_take_turns, args=(tmp_path / "x.pt", tmp_path / "inside")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """Such as NFS without its lock service; a stub, since there is none here."""

    def flock(_file, _operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level("WARNING", logger="fairseq_moe_ext"), only_writer(tmp_path / "x.pt"):
        assert f"{tmp_path} has no locks" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_device_or_a_folder_that_is_missing_or_protected(tmp_path):
    (tmp_path / "x.pt").symlink_to("/dev/null")
    for path, error in (
        ("x.pt", "x.pt: the new checkpoint must be a file"),
        ("missing/x.pt", "missing/x.pt: it cannot be written: No such file"),
    ):
        with pytest.raises(CheckpointError, match=error), only_writer(tmp_path / path):
            pass


@pytest.mark.parametrize("name", ["from NLLB", "merge"])
def test_a_target_that_is_a_link_stays_one_and_its_file_keeps_its_mode(made, tmp_path, name):
    convert, target, _ = CONVERSIONS[name]
    (tmp_path / "store").mkdir()
    file, link = tmp_path / "store" / "model", tmp_path / target
    file.touch(0o600)
    link.symlink_to("store/model")
    convert(made, str(link), True)
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o600 and os.listdir(file.parent) == ["model"]
    check_is_whole(name, made, link)
