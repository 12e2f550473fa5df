"""The benchmark of quantising, as a command."""

import subprocess
import sys

import commands

SCRIPT = commands.REPOSITORY / "scripts" / "benchmarks" / "benchmark_quantizing.py"


def test_it_prints_a_rate_of_each_format_by_pytorch():
    given = "--outputs", "256", "--inputs", "500", "--rounds", "1"
    done = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines()]
    rates = {(name.strip(), by.strip()): float(rate) for name, by, rate in rows[2:]}
    assert rates[("int8", "PyTorch")] > 0 and rates[("int4", "PyTorch")] > 0
