"""scripts/benchmarks/measure_parts.py on a small layer."""

import re
import sys

import commands
import processes


def test_every_part_of_a_layer_has_its_time():
    script = commands.REPOSITORY / "scripts" / "benchmarks" / "measure_parts.py"
    command = [sys.executable, script, "--shape", "3", "4", "8", "8", "--seconds", "0.2"]
    done = processes.run(command, timeout=120, env=commands.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = re.findall(r"^\| 3, 4, 8, 8 +\|(.*)\|$", done.stdout, re.M)
    *parts, whole = (int(each.replace(",", "")) for each in row.split("|"))
    assert len(parts) == 4 and min(*parts, whole) > 0
