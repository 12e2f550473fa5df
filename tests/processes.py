"""Processes of Python that start at once: forks of a server that has imported torch and fairseq (fork_server.py)."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

SERVER = Path(__file__).parent / "fork_server.py"


def run(
    command: Iterable[object],
    *,
    stdin: str = "",
    env: dict[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 600,
    file_size: int | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """As subprocess.run of a `Process`'s command, its output captured as text; in a `fresh` interpreter where asked.

    Raises subprocess.TimeoutExpired after `timeout` seconds; the process is killed.
    """
    command = [str(part) for part in command]
    if fresh:
        more = {"capture_output": True, "text": True, "encoding": "utf-8", "check": False}
        return subprocess.run(command, input=stdin, env=env, cwd=cwd, timeout=timeout, **more)
    (their_stdin, our_stdin), (our_stdout, their_stdout), (our_stderr, their_stderr) = (os.pipe() for _ in range(3))
    theirs = (their_stdin, their_stdout, their_stderr)
    try:
        process = Process(command, theirs, env=env, cwd=cwd, file_size=file_size)
    finally:
        for end in theirs:
            os.close(end)
    with ThreadPoolExecutor(3) as pool:
        pool.submit(_write, our_stdin, stdin)
        said = [pool.submit(_read, end) for end in (our_stdout, our_stderr)]
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, code, *(each.result() for each in said))


class Process:
    """As subprocess.Popen: [sys.executable, "-m" module, "-c" text or script, arguments] or [script, arguments].

    streams: descriptors that become its stdin, stdout and stderr. file_size: bytes to which a file
    may grow. session: in a session of its own.
    """

    def __init__(
        self,
        command: Iterable[object],
        streams: tuple[int, int, int],
        *,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
        file_size: int | None = None,
        session: bool = False,
    ):
        self.args = [str(part) for part in command]
        self.returncode: int | None = None
        request = {"command": self.args, "file_size": file_size, "session": session}
        request |= {"environment": dict(os.environ if env is None else env), "folder": str(cwd or os.getcwd())}
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(server_address())
            socket.send_fds(server, [b"."], streams)
            self._server = Connection(server.detach())
        self._server.send(request)
        self.pid = self._server.recv()

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        if self.returncode is None and self._server.poll():
            self.returncode = self._server.recv()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not self._server.poll(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def server_address() -> str:
    """Of this process's server, which starts with the first call and ends with this process."""
    folder = tempfile.TemporaryDirectory()
    address = str(Path(folder.name) / "server")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH", None)  # each command has its own
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)  # what its forks have, too
    server = subprocess.Popen([sys.executable, str(SERVER), address], env=env, **pipes)
    if not server.stdout.readline():
        raise RuntimeError(f"the fork server did not start:\n{server.stderr.read().decode()}")
    atexit.register(_stop, server, folder)
    return address


def _stop(server: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    server.stdin.close()  # it ends itself, also where this process is killed
    server.wait()
    folder.cleanup()


def _write(end: int, text: str) -> None:
    try:
        with open(end, "w", encoding="utf-8") as file:
            file.write(text)
    except BrokenPipeError:  # it does not read
        pass


def _read(end: int) -> str:
    with open(end, encoding="utf-8") as file:
        return file.read()
