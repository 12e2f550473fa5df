"""A process that imports torch and fairseq once and forks for each command: processes.py starts it and asks it.

Such a fork is what `python -m`, `python script` or `python -c` would be, without the seconds that the imports take: its
own arguments, environment, folder, streams, `__main__` and exit code, by Python's own ways to start and to end. This
process itself runs no command, so none sees another's traces. fairseq_moe_ext is not imported here: it comes in by
--user-dir or an import, as in any process. The ranks that a forked torchrun starts are forks, too.

What forks share, and processes of the interpreter do not: the seed of Python's hashes, and the addresses of memory.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import resource
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import numpy
import processes
import quick_hydra
import sacrebleu  # noqa: F401
import torch
import torch.distributed.run  # noqa: F401
import torch.fx.experimental.symbolic_shapes  # noqa: F401 (PyTorch's attention asks for it)
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


def serve(address: str) -> dict:
    """Answer until stdin ends; returns in the forks alone, with what each is to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    os.write(1, b"ready\n")
    running: dict[int, Connection] = {}
    while True:
        clients = {client.fileno(): pid for pid, client in running.items()}
        for ready in select.select([0, listener, woken, *clients], [], [])[0]:
            if ready == 0:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif ready is listener:
                request, streams, client = _request(listener)
                pid = os.fork()
                if pid == 0:
                    for end in (woken, wake):
                        os.close(end)
                    for each in (listener, client, *running.values()):
                        each.close()
                    _become(request, streams)
                    return request
                for stream in streams:
                    os.close(stream)
                running[pid] = client
                _tell(client, pid)
            elif ready == woken:
                os.read(woken, 4096)
                _reap(running)
            elif clients[ready] in running:  # its client has gone
                os.kill(clients[ready], signal.SIGKILL)


def _request(listener: socket.socket) -> tuple[dict, list[int], Connection]:
    accepted, _ = listener.accept()
    _, streams, _, _ = socket.recv_fds(accepted, 1, 3)
    client = Connection(accepted.detach())
    return client.recv(), streams, client


def _tell(client: Connection, number: int) -> None:
    try:
        client.send(number)
    except OSError:  # it has gone
        pass


def _reap(running: dict[int, Connection]) -> None:
    """Tell of all that have ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        client = running.pop(pid)
        _tell(client, os.waitstatus_to_exitcode(status))
        client.close()


def _become(request: dict, streams: list[int]) -> None:
    """Make this fork of the server a process of its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    if threads != 1:  # the server's
        torch.set_num_threads(threads)
    torch.seed()
    numpy.random.seed()


def run(command: list[str]) -> None:
    """Run [python, -m module | -c text | script, arguments] or [script, arguments] as the main program."""
    arguments = command[1:] if command[0] == sys.executable else command
    if arguments[0] == "-u":  # torchrun's ranks
        sys.stdout.reconfigure(write_through=True)
        del arguments[0]
    first, *rest = arguments
    main = types.ModuleType("__main__")
    main.__builtins__, main.__annotations__ = __builtins__, {}
    sys.modules["__main__"] = main
    wanted = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    base = [*(os.path.abspath(path) for path in wanted if path), *sys.path[1:]]
    if first == "-m":
        sys.argv, sys.path = ["-m", *rest[1:]], [os.getcwd(), *base]
        sys.modules.pop(rest[0], None)  # as main it is another module
        runpy._run_module_as_main(rest[0])
    elif first == "-c":
        sys.argv, sys.path = ["-c", *rest[1:]], ["", *base]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path = arguments, [os.path.dirname(os.path.realpath(first)), *base]
        main.__file__, main.__cached__ = first, None
        exec(compile(Path(first).read_bytes(), first, "exec"), main.__dict__)


def _exit_code(command: list[str]) -> int:
    """Run the command, and tell of what it raises as the interpreter does."""
    try:
        run(command)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return int(error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> NoReturn:
    """As the interpreter ends, but that it leaves memory as it is: to free it takes 0.3 s."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        if not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


class Stash:
    """A package's modules, out of sys.modules until a command imports them; `imported` is called once they are there.

    What its import prints and does to the root logger comes at that moment: fairseq-train sets the logger before, the
    other commands after.
    """

    def __init__(self, name: str, imported: Callable[[], None]):
        self._name = name
        with tempfile.TemporaryFile() as said:
            stderr = os.dup(2)
            os.dup2(said.fileno(), 2)
            try:
                __import__(name)
                length = os.fstat(said.fileno()).st_size
                imported()
            finally:
                os.dup2(stderr, 2)
                os.close(stderr)
            said.seek(0)
            self._said = said.read(length).decode()
        root = logging.getLogger()
        self._logger = root.handlers[:], root.level
        root.handlers.clear()
        root.setLevel(logging.WARNING)
        self._modules = {key: sys.modules.pop(key) for key in list(sys.modules) if f"{key}.".startswith(f"{name}.")}

    def find_spec(self, name: str, _path=None, _target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == self._name else None

    def create_module(self, _spec: ModuleSpec) -> types.ModuleType:
        self._spec = self._modules[self._name].__spec__
        return self._modules[self._name]

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec
        sys.modules.update(self._modules)
        sys.meta_path.remove(self)
        sys.stderr.write(self._said)
        root = logging.getLogger()
        if not root.handlers:
            root.handlers, root.level = self._logger


def parse_defaults() -> None:
    """Those of fairseq's serving commands: hydra's parser learns them."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from hydra.core.singleton import Singleton
    from hydra.core.utils import JobRuntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come once in a process: the command's own
        for parser in (options.get_generation_parser(), options.get_eval_lm_parser()):
            convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, ["data", "--path", "x.pt"]))
    Singleton._instances.pop(JobRuntime)


def fork_rank(handler: SubprocessHandler, command: tuple, env: dict[str, str]) -> processes.Process:
    """In place of torchrun's own start of a rank."""
    return processes.Process(command, (0, *_streams(handler)), env=env, session=True)


def _streams(handler: SubprocessHandler) -> tuple[int, int]:
    files = (handler._stdout, 1), (handler._stderr, 2)
    return tuple(number if file is None else file.fileno() for file, number in files)


def main() -> None:
    (address,) = sys.argv[1:]
    processes.server_address = lambda: address
    SubprocessHandler._popen = fork_rank
    quick_hydra.install()
    sys.meta_path.insert(0, Stash("fairseq", parse_defaults))
    gc.collect()
    gc.freeze()
    request = serve(address)
    _end(_exit_code(request["command"]))


if __name__ == "__main__":
    main()
