"""Programs for a shell's PATH that start at once: each asks the tests' fork server (processes.py) for a fork."""

from __future__ import annotations

import sys
from pathlib import Path

import processes

BIN = Path(sys.executable).parent
FAIRSEQS = ("generate", "interactive", "eval-lm", "preprocess")
PROGRAMS = ("python", "torchrun", "fairseq-moe", *(f"fairseq-{name}" for name in FAIRSEQS))
_PROGRAM = """#!{python}
import os
import sys
sys.path.insert(0, {tests!r})
import processes
processes.server_address = lambda: {address!r}
name = os.path.basename(sys.argv[0])
ways = {{"python": [sys.executable], "fairseq-moe": [sys.executable, "-m", "fairseq_moe_ext"]}}
program = ways.get(name, [os.path.join({bin!r}, name)])
code = processes.Process([*program, *sys.argv[1:]], (0, 1, 2)).wait()
sys.exit(code if code >= 0 else 128 - code)
"""


def write_programs(folder: Path) -> None:
    """Fill `folder`, which is to come first in PATH; its programs work for as long as this process lives."""
    folder.mkdir()
    values = {"python": sys.executable, "bin": str(BIN), "tests": str(Path(__file__).parent)}
    for name in PROGRAMS:
        (folder / name).write_text(_PROGRAM.format(**values, address=processes.server_address()), encoding="utf-8")
        (folder / name).chmod(0o755)
    for name in ("sacrebleu", "pip"):
        (folder / name).symlink_to(BIN / name)
