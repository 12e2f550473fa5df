"""scripts/benchmarks/measure_recording.py on a small layer."""

import re
import sys

import commands
import processes


def test_a_layer_has_its_times_with_and_without_a_record():
    script = commands.REPOSITORY / "scripts" / "benchmarks" / "measure_recording.py"
    command = [sys.executable, script, "--shape", "3", "4", "8", "8", "--calls", "5"]
    done = processes.run(command, timeout=120, env=commands.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^\| 3, 4, 8, 8 +\| \d+ +\| [+-][\d.]+% +\| [+-][\d.]+% +\|$", done.stdout, re.M)
