"""Two conversions never write one checkpoint, whoever starts them, on whichever machine."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fairseq_moe_ext.checkpoints.errors import CheckpointError

logger = logging.getLogger("fairseq_moe_ext")

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems without them


@contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """In this context no other conversion writes `target`, a file or a folder, by whichever link.

    CheckpointError where another one does, where the lock beside `target` cannot be made, or where `target` is a
    device or the like. The lock ends with the process that holds it, however it ends.
    """
    real = Path(os.path.realpath(target))
    lock = real.with_name(os.fsencode(real.name)[:200].decode("utf-8", "ignore") + ".lock")
    try:
        if real.exists() and not stat.S_ISREG(real.stat().st_mode) and not real.is_dir():
            raise CheckpointError(f"{target}: the new checkpoint must be a file, not a device")
        opened = _locked(lock)
    except BlockingIOError as error:
        raise CheckpointError(f"another conversion writes {target}") from error
    except OSError as error:
        raise CheckpointError(f"{target}: it cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is held: who has opened it meanwhile sees that it is gone
        os.close(opened)


def _locked(lock: Path) -> int:
    """The open lock file; BlockingIOError where another process, or another thread, holds it."""
    while True:
        opened = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(opened), os.stat(lock)):
                return opened
            os.close(opened)
        except FileNotFoundError:  # its holder has removed it between the two
            os.close(opened)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning("%s has no locks: no other conversion may write there meanwhile", lock.parent)
                return opened
            os.close(opened)
            raise
