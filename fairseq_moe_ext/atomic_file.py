"""Every file that is written gets its name when it is complete, or leaves what was there.

A regular file is written under a temporary name of its own in the same folder and renamed; links stay and lead to the
new content. What is no regular file (a device, a FIFO, `/dev/stdout`) is written in place.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

PathLike = str | os.PathLike

_LINKS = 40  # as many as Linux follows
_DESCRIPTOR = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd/(\d+)")  # what /dev/stdout and /dev/fd/3 lead to
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENOENT)  # by a folder, not by the file in it
_NAME_BYTES = 200  # of a file's name in its temporary name, which may have 255
# FIFOs that `check_writable` has opened, by device and inode: closing one would end its reader
_open_fifos: dict[tuple[int, int], int] = {}


class WriteError(OSError):
    """A file that cannot be written; the message names flag, file and `reason`."""

    def __init__(self, path: PathLike, flag: str, reason: str):
        subject = f"{flag} {os.fspath(path)}" if flag else f"{os.fspath(path)}: it"
        super().__init__(f"{subject} cannot be written: {reason}")
        self.reason = reason


@contextmanager
def new_file(path: PathLike, flag: str = "", text: bool = False) -> Iterator[IO]:
    """A file to write, binary or UTF-8 text, whose content is at `path` when the context ends without an error.

    flag: the option that named the file, for messages. WriteError where it cannot be written; then, and after any
    other error, an interrupt or SIGTERM, what was there before is left and nothing else. `name` of what is yielded is
    the path at which the content is to lie meanwhile. It may be closed in the context.
    """
    with _signals_as_exceptions():
        try:
            output = _Output(path)
        except OSError as error:
            raise _write_error(path, flag, error) from error
        try:
            raw = io.BufferedWriter(output)
            file: IO = io.TextIOWrapper(raw, encoding="utf-8", newline="") if text else raw
            yield file
            with output.failure_kept():
                file.close()
                output.put_in_place()
        except Exception as error:
            if output.failure is None:
                raise
            raise _write_error(path, flag, output.failure) from error
        finally:
            output.discard()


def write_bytes(path: PathLike, content: bytes, flag: str = "") -> None:
    """Write `content`; WriteError as `new_file`."""
    with new_file(path, flag) as file:
        file.write(content)


def write_text(path: PathLike, content: str, flag: str = "") -> None:
    """Write `content` as UTF-8; WriteError as `new_file`."""
    write_bytes(path, content.encode(), flag)


def write_json(path: PathLike, content: Any, flag: str = "", indent: int | None = 1) -> None:
    """Write `content` as JSON; WriteError as `new_file`."""
    write_text(path, json.dumps(content, indent=indent) + "\n", flag)


def copy_file(source: PathLike, path: PathLike, flag: str = "") -> None:
    """Copy the content of `source`; WriteError as `new_file`, another OSError where `source` cannot be read."""
    with open(source, "rb") as content, new_file(path, flag) as file:
        shutil.copyfileobj(content, file)


def check_writable(path: PathLike, flag: str = "") -> None:
    """WriteError where `path` cannot be written now; nothing is changed.

    The reader of a FIFO finds it open until it is written, or this process ends.
    """
    try:
        output = _Output(path, probe=True)
    except OSError as error:
        raise _write_error(path, flag, error) from error
    output.discard()


def give_name(file: PathLike, path: PathLike) -> None:
    """Give the complete `file`, which lies in the same folder as what `path` leads to, that name.

    Links, owner and mode stay as `new_file` leaves them; an OSError where it cannot be renamed.
    """
    target, _ = _follow_links(path)
    status = os.stat(target) if os.path.exists(target) else None
    _keep_owner_and_mode(file, status)
    _rename(file, target, status)


def refuse_unwritable(parser: argparse.ArgumentParser, flag: str, path: PathLike) -> None:
    """End a program whose option `flag` names what cannot be written, before its work."""
    try:
        check_writable(path, flag)
    except WriteError as error:
        parser.error(str(error))


class _Output(io.FileIO):
    """The open file behind a path: a temporary one, or the target itself; `failure` is its first error.

    probe: it is opened to see whether it can be; it keeps its content.
    """

    def __init__(self, path: PathLike, probe: bool = False):
        self.failure: OSError | None = None
        self._temporary: str | None = None
        self._target, descriptor = _follow_links(path)
        self._status: os.stat_result | None
        try:
            self._status = os.stat(self._target)
        except FileNotFoundError:
            self._status = None
        if descriptor is not None:
            opened = _duplicate(descriptor)
        elif self._status is not None and not stat.S_ISREG(self._status.st_mode):
            opened = _open_special(self._target, self._status, probe)
        else:
            opened = self._open_temporary(probe)
        super().__init__(opened, "wb")
        self.name = self._temporary or self._target

    def _open_temporary(self, probe: bool) -> int:
        """A new file beside the target; the target itself where its folder takes no new one."""
        folder, name = os.path.split(self._target)
        kept = os.fsencode(name)[:_NAME_BYTES].decode("utf-8", "ignore")
        temporary = os.path.join(folder, f"{kept}.{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CLOEXEC
        if self._status is not None:
            os.close(os.open(self._target, flags))  # a file that is protected is not replaced
        elif len(os.fsencode(name)) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        try:
            opened = os.open(temporary, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            if self._status is None and not os.path.isdir(folder):
                raise OSError(error.errno, f"there is no folder {folder}") from error
            if self._status is None or error.errno not in _REFUSED:
                raise
            return os.open(self._target, flags | (0 if probe else os.O_TRUNC))
        self._temporary = temporary
        _keep_owner_and_mode(opened, self._status)
        return opened

    def write(self, content) -> int:
        with self.failure_kept():
            return super().write(content)

    def close(self) -> None:
        with self.failure_kept():
            if not self.closed and self._temporary is not None and self.failure is None:
                os.fsync(self.fileno())
            super().close()

    def put_in_place(self) -> None:
        """The content is complete and the file closed."""
        if self._temporary is not None:
            _rename(self._temporary, self._target, self._status)

    def discard(self) -> None:
        """Close without what is still buffered, and remove the temporary file if it is there."""
        with suppress(OSError):
            super().close()
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)

    @contextmanager
    def failure_kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            raise


def _keep_owner_and_mode(file: int | PathLike, status: os.stat_result | None) -> None:
    if status is not None:  # as far as this user and the file system can
        with suppress(OSError):
            os.chown(file, status.st_uid, status.st_gid)
        with suppress(OSError):
            os.chmod(file, stat.S_IMODE(status.st_mode))


def _rename(temporary: PathLike, target: str, status: os.stat_result | None) -> None:
    """status: of the file that `temporary` replaces."""
    try:
        os.replace(temporary, target)
    except OSError as error:
        if status is None or error.errno not in _REFUSED:
            raise
        # another user's file in a sticky folder, or a file that is a mount: only its content can be replaced
        with open(temporary, "rb") as content, open(target, "wb") as file:
            shutil.copyfileobj(content, file)
        os.unlink(temporary)


def _follow_links(path: PathLike) -> tuple[str, int | None]:
    """The path behind all links, and the descriptor of this process that it stands for, if it does."""
    found = os.fspath(path)
    for _ in range(_LINKS):
        folder, name = os.path.split(found)
        found = os.path.join(os.path.realpath(folder), name)
        match = _DESCRIPTOR.fullmatch(found)
        if match is not None:  # where another process's leads to, only the system knows
            return found, int(match[2]) if int(match[1]) == os.getpid() else None
        if not os.path.islink(found):
            return found, None
        found = os.path.join(os.path.dirname(found), os.readlink(found))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _duplicate(descriptor: int) -> int:
    """Another descriptor of the same open file, at the place that its writers have come to."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "it is open for reading only")
    return os.dup(descriptor)


def _open_special(target: str, status: os.stat_result, probe: bool) -> int:
    """A device or a FIFO, to be written in place."""
    for is_kind, kind in ((stat.S_ISDIR, "folder"), (stat.S_ISBLK, "block device"), (stat.S_ISSOCK, "socket")):
        if is_kind(status.st_mode):
            raise OSError(errno.EINVAL, f"it is a {kind}")
    is_fifo, key = stat.S_ISFIFO(status.st_mode), (status.st_dev, status.st_ino)
    opened = _open_fifos.pop(key, None)
    if opened is None:
        try:
            opened = os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if is_fifo and error.errno == errno.ENXIO:
                raise OSError(errno.ENXIO, "it is a FIFO that nothing reads") from error
            raise
        os.set_blocking(opened, True)
    if is_fifo and probe:
        _open_fifos[key] = os.dup(opened)
    return opened


def _write_error(path: PathLike, flag: str, error: OSError) -> WriteError:
    return WriteError(path, flag, error.strerror or str(error))


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP, where they would end the process at once, raise SystemExit in this context."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number, frame):
        sys.exit(128 + number)

    taken = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
