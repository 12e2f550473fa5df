"""Forks of the server against processes of the interpreter: what a program sees, and what is seen of it."""

import os
import re
import signal
import subprocess
import sys

import commands
import processes
import pytest

SEES = """
import json, logging, os, random, signal, sys, threading
import __main__
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "stdin": sys.stdin.read(), "environment": dict(os.environ),
    "main": [__name__, sorted(vars(__main__)), getattr(__main__, "__file__", ""), __main__ is sys.modules["__main__"]],
    "threads": threading.active_count(), "signals": [str(signal.getsignal(each)) for each in (2, 15, 17)],
    "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1], "group": os.getpgid(0),
    "streams": [[each.encoding, each.errors, each.line_buffering] for each in (sys.stdin, sys.stdout, sys.stderr)],
    "logger": [len(logging.root.handlers), logging.root.level],
    "modules": [name in sys.modules for name in ("fairseq", "fairseq.tasks", "fairseq_moe_ext", "fairseq_cli")],
    "umask": os.umask(0),
}, indent=1))
"""


def started(command, **how) -> list[subprocess.CompletedProcess]:
    """[in a fork, in an interpreter of its own]"""
    how = {"env": {**os.environ, "ASKED": "for", "PYTHONPATH": "some/where"}, **how}
    return [processes.run(command, fresh=fresh, **how) for fresh in (False, True)]


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_fork_sees_what_a_process_of_the_interpreter_sees(tmp_path, kind):
    (tmp_path / "program.py").write_text(SEES)
    how = {"-c": ["-c", SEES], "-m": ["-m", "program"], "script": [tmp_path / "program.py"]}[kind]
    forked, fresh = started([sys.executable, *how, "an argument", "--flag"], stdin="line\nöther\n", cwd=tmp_path)
    assert forked.returncode == 0, forked.stderr
    assert forked.stdout == fresh.stdout
    assert forked.stderr == fresh.stderr == ""


ENDS = {
    "returns": "print('done')",
    "a code": "import sys; print('done'); sys.exit(3)",
    "a large code": "raise SystemExit(258)",
    "words": "import sys; sys.exit('that is why')",
    "nothing": "raise SystemExit",
    "an error": "def fails():\n    print('so far')\n    raise ValueError('öh') from KeyError(1)\nfails()",
    "no syntax": "print(",
    "a hook": "import sys; sys.excepthook = lambda kind, *_: print(kind); 1 / 0",
    "at exit": "import atexit, os; atexit.register(print, 'bye'); atexit.register(os.write, 1, b'unbuffered'); 1 / 0",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.05), print('later'))).start()",
    "at once": "import os; print('lost'); os._exit(7)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "import atexit, os, signal; atexit.register(print, 'bye'); os.kill(os.getpid(), signal.SIGINT)",
    "a full disk": "import sys; sys.stdout = open('/dev/full', 'w'); print('lost')",
}


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_a_fork_ends_as_a_process_of_the_interpreter_ends(program):
    forked, fresh = started([sys.executable, "-c", program])
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert re.sub("name='?[^ ']*'? ", "", forked.stderr) == re.sub("name='?[^ ']*'? ", "", fresh.stderr)


def test_a_fork_leaves_nothing_behind():
    """Neither in the server nor for the next."""
    changes = (
        "import os, sys, fairseq, torch\n"
        "torch.traces = fairseq.traces = sys.traces = 1; os.environ['TRACES'] = '1'\n"
        "os.chdir('/'); torch.manual_seed(1)"
    )
    looks = "import os, sys, fairseq, torch; print([hasattr(each, 'traces') for each in (torch, fairseq, sys)])"
    looks += "; print('TRACES' in os.environ, os.getcwd(), torch.initial_seed())"
    env = {**os.environ, "PYTHONPATH": ""}
    processes.run([sys.executable, "-c", changes], env=env)
    first, second = (processes.run([sys.executable, "-c", looks], env=env).stdout for _ in range(2))
    assert first.startswith(f"[False, False, False]\nFalse {os.getcwd()} ") and first != second


def test_a_fork_that_takes_too_long_is_killed(tmp_path):
    program = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", program], timeout=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_fork_gets_signals():
    process = processes.Process([sys.executable, "-c", "import time; time.sleep(60)"], (0, 1, 2))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == process.poll() == -signal.SIGTERM


def test_a_forked_command_says_what_a_fresh_one_says(shared_goldens):
    """Every line, those of the imports too, but for times; a warning may come again where more is imported later."""
    golden = shared_goldens / "lm_top1"
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_last.pt", *commands.LM, "--batch-size", 8)
    forked, fresh = (commands.run("eval-lm", *arguments, fresh=each) for each in (False, True))
    assert forked.stdout == fresh.stdout == ""
    measured = r"[\d.,]+(?=/s| tokens/s|s \()|at [\d,]+/s"
    said = [dict.fromkeys(re.sub(measured, "", done.stderr).splitlines()) for done in (forked, fresh)]
    assert list(said[0]) == list(said[1])
