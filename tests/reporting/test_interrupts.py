"""A served command that a signal ends in the middle writes its report and its trace."""

import json
import os
import signal
import sys
import time

import commands
import data_makers
import processes
import pytest

from fairseq_moe_ext.trace import load_trace


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_a_run_with_its_report_and_trace(tmp_path, number, code):
    data = data_makers.write_data(tmp_path / "data", ("en", "de"))
    data_makers.untrained_checkpoint(tmp_path / "x.pt", data, *data_makers.MT_TRAINING)
    report, trace, results = tmp_path / "report.json", tmp_path / "trace.npz", tmp_path / "results"
    flags = ("--batch-size", "1", "--moe-report", report, "--moe-trace", trace, "--results-path", results)
    command = commands.command_line("generate", data, "--path", tmp_path / "x.pt", *commands.MT, *flags)
    with open(tmp_path / "said", "w+", encoding="utf-8") as said, open(os.devnull, "r+b") as nothing:
        streams = (nothing.fileno(), nothing.fileno(), said.fileno())
        process = processes.Process(command, streams, env=commands.environment())
        try:
            translated, deadline = results / "generate-test.txt", time.monotonic() + 120
            while not (translated.is_file() and "\nH-" in translated.read_text(encoding="utf-8")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            assert process.wait(60) == code
        finally:
            process.kill()
        said.seek(0)
        text = said.read()
    assert "Generate test" not in translated.read_text(encoding="utf-8") and "Translated" not in text
    assert text.count("served: ") == text.count("interrupted in batch") == 1
    written = json.loads(report.read_text(encoding="utf-8"))
    assert 1 <= written["generation"]["sentences"] < 20
    assert len(load_trace(trace)["decode"].batch) == written["decoder"]["steps"]
    assert not list(tmp_path.glob(".*")) and {path.name for path in tmp_path.iterdir()} >= {report.name, trace.name}


ENDING = """
import atexit, os, signal, threading
from fairseq_moe_ext.reporting import interrupts
interrupts.fairseqs_command = lambda: "generate"
def ends():
    os.kill(os.getpid(), signal.SIGTERM)
    print("ends")
def finish():
    os.kill(os.getpid(), signal.SIGTERM)
    print("finishes")
class Waiting(threading.Thread):
    def run(self):
        threading.main_thread().join()
        os.kill(os.getpid(), signal.SIGTERM)
        print("waited")
atexit.register(ends)
assert interrupts.on_interrupt(lambda number: True, finish)
Waiting().start()
"""


def test_a_process_that_ends_by_itself_is_not_interrupted_any_more():
    """torchrun signals the ranks that are left, also one that is about to end: neither traceback nor another code."""
    command = [sys.executable, "-c", ENDING]
    done = processes.run(command, cwd=commands.REPOSITORY, env=commands.environment(), fresh=True)
    assert (done.returncode, done.stdout.split(), "Traceback" in done.stderr) == (
        0, ["waited", "finishes", "ends"], False,
    ), done.stderr[-2000:]
