"""One rank of a model that another process serves from Python: python -m fairseq_moe_ext.serving.worker.

It makes the calls that `load(..., distributed_world_size=R)` forwards to it, so that all ranks make the same ones, and
keeps their results to itself. Its errors are told by the ranks' exchange.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback

from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.workers import CLOSE, Order
from fairseq_moe_ext.serving.load import served_by

CALLS = ("translate", "generate", "score", "report")


def main() -> None:
    """Join the ranks, load the model, and make the calls that come on standard input until it ends."""
    logging.disable(logging.WARNING)  # rank 0 says what there is to be said
    lines = sys.stdin.buffer
    order = Order(**json.loads(lines.readline()))
    ranks = order.join()
    try:
        served = served_by(ranks, **order.load)
    except Exception:  # which rank 0 has heard of
        return
    for line in lines:
        name, arguments = json.loads(line)
        if name == CLOSE:
            break
        if name not in CALLS:
            raise ValueError(f"a forwarded call must be one of {', '.join(CALLS)}, got {name!r}")
        try:
            getattr(served, name)(**arguments)
        except ExchangeError:
            pass
        except Exception:
            if ranks.exchange.fault is not None:  # this rank's own, of which rank 0 knows the last line
                traceback.print_exc()
        if ranks.exchange.fault is not None:
            return
    served.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # the end of an interpreter with torch in it takes seconds, for which rank 0 would wait
