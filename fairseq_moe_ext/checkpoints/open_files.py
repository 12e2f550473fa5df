"""Files that are read at offsets, by any number of threads, of which few are open at a time."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from fairseq_moe_ext.checkpoints.errors import CheckpointError

LIMIT = 16  # of the files of one checkpoint: models have hundreds of them, a process often 1024 descriptors


class Descriptor:
    """An open file; closed with the last reference to it, hence never under a thread that reads."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = os.close  # still there when the interpreter ends

    def __del__(self):
        if hasattr(self, "number"):
            self._close(self.number)

    def state(self) -> tuple[int, ...]:
        """The size first; other after every change of the file, and of another file of its name."""
        found = os.fstat(self.number)
        return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino


class OpenFiles:
    """Keeps the `limit` files open that were used last."""

    def __init__(self, limit: int = LIMIT):
        self._limit = limit
        self._lock = threading.Lock()
        self._recent: OrderedDict[weakref.ref[ReopenedFile], None] = OrderedDict()

    def descriptor(self, file: ReopenedFile) -> Descriptor:
        """The file's open descriptor; opens it, and closes the least recently used one beyond the limit."""
        with self._lock:
            if file.opened is None:
                file.opened = file.open()
            key = weakref.ref(file)
            self._recent[key] = None
            self._recent.move_to_end(key)
            while len(self._recent) > self._limit:
                oldest, _ = self._recent.popitem(last=False)
                if (least_used := oldest()) is not None:
                    least_used.opened = None
            return file.opened


class ReopenedFile:
    """A file that must stay as it is; it is closed while others are used, and when nobody refers to it any more.

    OSError where it cannot be opened. opened: belongs to `files`.
    """

    def __init__(self, path: Path, files: OpenFiles):
        self.path = path
        self._files = files
        self.opened: Descriptor | None = Descriptor(path)
        self._state = self.opened.state()

    def descriptor(self) -> Descriptor:
        """CheckpointError where the file is gone, or another one, when it is opened again."""
        return self._files.descriptor(self)

    def open(self) -> Descriptor:
        """Open it once more; CheckpointError where it is gone or another."""
        try:
            opened = Descriptor(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: the file must stay while it is in use: {error.strerror}") from error
        self.check_unchanged(opened)
        return opened

    def check_unchanged(self, opened: Descriptor) -> None:
        """CheckpointError where `opened` is not the file as it first was."""
        if opened.state() != self._state:
            raise CheckpointError(f"{self.path}: the file was changed while it was in use")
