"""torchrun's ranks on this machine for `--distributed-world-size`: python -m fairseq_moe_ext.ranks.launch.

As torchrun, but what it says of a rank that failed is the sentence that the rank left, last and once; torchrun's own
account comes where there is none.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

START = (sys.executable, "-m", "fairseq_moe_ext.ranks.launch")


def start_ranks(ranks: int, command: str, arguments: list[str]) -> NoReturn:
    """Become the process that starts `ranks` ranks of fairseq's `command` (`eval_lm`) with `arguments`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*START, str(ranks), f"fairseq_cli.{command}", *arguments])


def main() -> None:
    """Run `RANKS MODULE ARGUMENTS` of the command line: the module, once per rank, by torchrun."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    ranks, module, *arguments = sys.argv[1:]
    torchrun = logging.getLogger("torch.distributed.elastic")
    torchrun.setLevel(logging.CRITICAL)
    torchrun.propagate = False
    try:
        run(parse_args(["--standalone", "--nproc-per-node", ranks, "-m", module, *arguments]))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        print(_sentence(first.error_file) or error, file=sys.stderr, flush=True)
        sys.exit(first.exitcode if first.exitcode >= 0 else 128 - first.exitcode)


def _sentence(file: str) -> str | None:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


if __name__ == "__main__":
    main()
