"""fairseq_moe_ext.atomic_file: complete or not there, whatever the target is; real files, FIFOs, devices, processes."""

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from full_disk import full_at

from fairseq_moe_ext import atomic_file
from fairseq_moe_ext.atomic_file import WriteError, check_writable, copy_file, new_file, write_bytes, write_text

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root")


@contextmanager
def as_nobody():
    """The permissions of another user, in this process."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user can enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


# --- regular files and links


def test_a_file_is_new_or_replaced_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "file"
    for content in (b"one", b"another"):
        write_bytes(file, content)
        assert file.read_bytes() == content
    copy_file(file, tmp_path / "copy")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"file": b"another", "copy": b"another"}


def test_until_the_end_the_old_content_is_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with new_file(file, text=True) as opened:
        opened.write("new")
        opened.flush()
        assert file.read_text() == "old" and Path(opened.name).parent == tmp_path
    assert file.read_text() == "new"


def test_a_path_writer_may_fill_the_temporary_file(tmp_path):
    with new_file(tmp_path / "file") as opened:
        Path(opened.name).write_bytes(b"by its path")
    assert (tmp_path / "file").read_bytes() == b"by its path"


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "dangling"])
def test_a_link_stays_and_its_target_is_written(tmp_path, there):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    target, link, second = tmp_path / "a" / "target", tmp_path / "b" / "link", tmp_path / "second"
    link.symlink_to("../a/target")
    second.symlink_to(link)
    if there:
        target.write_text("old")
    check_writable(second)
    assert target.exists() == there
    write_text(second, "new")
    assert link.is_symlink() and second.is_symlink() and not target.is_symlink()
    assert target.read_text() == "new"
    assert [len(list((tmp_path / name).iterdir())) for name in "ab"] == [1, 1]


def test_modes_are_those_of_the_umask_or_of_the_file_that_is_replaced(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_text(tmp_path / "new", "")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


@pytest.mark.parametrize("name", ["n" * 255, "\N{GREEK SMALL LETTER ALPHA}" * 127])
def test_names_of_255_bytes(tmp_path, name):
    check_writable(tmp_path / name)
    write_text(tmp_path / name, "")
    assert [file.name for file in tmp_path.iterdir()] == [name]


# --- targets that cannot be written


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("other")
    (folder / "other").symlink_to("loop")
    return folder / "loop"


def dangling(folder: Path) -> Path:
    (folder / "link").symlink_to("missing/file")
    return folder / "link"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder, "it is a folder"),
        (lambda folder: folder / "missing" / "file", "there is no folder .*missing"),
        (dangling, "there is no folder .*missing"),
        (loop, os.strerror(errno.ELOOP)),
        (lambda folder: folder / ("n" * 256), os.strerror(errno.ENAMETOOLONG)),
        (fifo, "it is a FIFO that nothing reads"),
    ],
    ids=["folder", "no folder", "link into no folder", "loop of links", "long name", "FIFO without a reader"],
)
def test_what_cannot_be_written_is_said_at_the_start_and_at_the_end(tmp_path, make, reason):
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    for attempt in (lambda: check_writable(path, "--flag"), lambda: write_bytes(path, b"content", "--flag")):
        with pytest.raises(WriteError, match=f"^--flag {path} cannot be written: {reason}$"):
            attempt()
    assert sorted(tmp_path.iterdir()) == before


@needs_root
def test_folders_and_files_of_others(open_folder):
    file = open_folder / "file"
    file.write_text("old")
    with as_nobody():
        for path in (file, open_folder / "new"):
            with pytest.raises(WriteError, match=f"{path}: it cannot be written: {os.strerror(errno.EACCES)}"):
                check_writable(path)
            with pytest.raises(WriteError, match=f"{path}: it cannot be written: {os.strerror(errno.EACCES)}"):
                write_text(path, "new")
    assert file.read_text() == "old"


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o1777], ids=["folder of another", "sticky folder"])
def test_a_writable_file_in_a_folder_where_no_other_may_be_replaced(open_folder, mode):
    file = open_folder / "file"
    file.write_text("old and longer")
    file.chmod(0o666)
    open_folder.chmod(mode)
    with as_nobody():
        check_writable(file)
        assert file.read_text() == "old and longer"
        write_text(file, "new")
    assert file.read_text() == "new" and file.stat().st_uid == 0
    assert list(open_folder.iterdir()) == [file]


@needs_root
def test_a_file_that_is_protected_from_its_owner_is_not_replaced(open_folder):
    open_folder.chmod(0o777)
    with as_nobody():
        (open_folder / "file").write_text("old")
        (open_folder / "file").chmod(0o444)
        with pytest.raises(WriteError, match=os.strerror(errno.EACCES)):
            write_text(open_folder / "file", "new")
    assert (open_folder / "file").read_text() == "old"


@needs_root
def test_the_owner_stays(tmp_path):
    write_text(tmp_path / "file", "old")
    os.chown(tmp_path / "file", NOBODY, NOBODY)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_uid == NOBODY


# --- devices, FIFOs, descriptors


def test_devices_are_written_in_place():
    check_writable("/dev/null")
    write_text("/dev/null", "content")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(WriteError, match=f"^--report /dev/full cannot be written: {os.strerror(errno.ENOSPC)}$"):
        write_text("/dev/full", "content", "--report")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("linked", [False, True])
def test_the_reader_of_a_fifo_gets_everything_though_it_was_checked_before(tmp_path, linked):
    path = fifo(tmp_path)
    content = os.urandom(1 << 20)  # more than a pipe holds
    if linked:
        path = tmp_path / "link"
        path.symlink_to("fifo")
    with open(tmp_path / "read", "wb") as out, subprocess.Popen(["cat", tmp_path / "fifo"], stdout=out) as cat:
        while True:  # until cat has opened it
            with suppress(WriteError):
                check_writable(path)
                break
        check_writable(path)
        write_bytes(path, content)
        assert cat.wait(timeout=60) == 0
    assert (tmp_path / "read").read_bytes() == content
    assert stat.S_ISFIFO(os.stat(path).st_mode) and not atomic_file._open_fifos


def test_the_reader_of_a_fifo_that_ends_early(tmp_path):
    path = fifo(tmp_path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(path)
    os.close(reader)
    with pytest.raises(WriteError, match=os.strerror(errno.EPIPE)):
        write_bytes(path, b"content")


WRITES_STDOUT = """
import sys
from fairseq_moe_ext.atomic_file import check_writable, write_text
print("before")
check_writable(sys.argv[1])
write_text(sys.argv[1], "written\\n")
print("after")
"""


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_is_continued(tmp_path, path, kind):
    if path == "link":
        path = tmp_path / "link"
        path.symlink_to("/dev/stdout")
    command = [sys.executable, "-c", WRITES_STDOUT, str(path)]
    if kind == "pipe":
        found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    else:
        with open(tmp_path / "out", "w", encoding="utf-8") as out:
            subprocess.run(command, stdout=out, check=True)
        found = (tmp_path / "out").read_text()
    assert found == "before\nwritten\nafter\n"


def test_another_processs_descriptor(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=out)
        for number, content in (("1", "to the file"), ("0", "to nothing")):
            write_text(f"/proc/{process.pid}/fd/{number}", content)
        process.kill()
        process.wait()
    assert (tmp_path / "out").read_text() == "to the file"


def test_a_descriptor_that_only_reads_or_is_closed(tmp_path):
    (tmp_path / "file").write_text("old")
    with open(tmp_path / "file", encoding="utf-8") as opened:
        path = f"/dev/fd/{opened.fileno()}"
        for attempt in (lambda: check_writable(path), lambda: write_text(path, "new")):
            with pytest.raises(WriteError, match=f"{path}: it cannot be written: it is open for reading only"):
                attempt()
    with pytest.raises(WriteError, match=os.strerror(errno.EBADF)):
        write_text(path, "new")
    assert (tmp_path / "file").read_text() == "old"


# --- failures on the way


@pytest.mark.parametrize("size", [10, 1_000_000], ids=["at the end", "on the way"])
def test_a_full_disk_leaves_what_was_there(tmp_path, size):
    write_text(tmp_path / "file", "old")
    message = f"^--out {tmp_path / 'file'} cannot be written: {os.strerror(errno.EFBIG)}$"
    with full_at(5), pytest.raises(WriteError, match=message):
        write_bytes(tmp_path / "file", b"n" * size, "--out")
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_error_of_the_writer_is_passed_on_and_leaves_nothing(tmp_path, error):
    with pytest.raises(error) as raised, new_file(tmp_path / "file") as opened:
        opened.write(b"content")
        raise error("its own")
    assert not isinstance(raised.value, WriteError) and raised.value.args == ("its own",)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing_and_ends_the_process(tmp_path):
    with pytest.raises(SystemExit) as raised, new_file(tmp_path / "file") as opened:
        opened.write(b"content")
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == 143 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _write_often(path: str, letter: str) -> None:
    for _ in range(60):
        write_text(path, letter * 100_000)


def test_processes_and_threads_that_write_one_file(tmp_path):
    """Whichever comes last, the content is one writer's."""
    path = str(tmp_path / "file")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, letter)) for letter in "ab"]
    writers += [threading.Thread(target=_write_often, args=(path, letter)) for letter in "cd"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with suppress(FileNotFoundError):
            content = Path(path).read_text()
            assert len(content) == 100_000 and len(set(content)) == 1
    for writer in writers:
        writer.join()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
