#!/usr/bin/env python3
"""Translate over HTTP: one model, one worker thread that owns it, and clients whose sentences share its steps.

    python examples/server.py model.pt --data data-bin --load '{"post_process": "sentencepiece"}' --port 8080
    curl -d '{"text": "a sentence", "beam": 4}' http://127.0.0.1:8080/translate

POST /translate {"text": a string, or a list of strings, and any option of a request: beam, nbest, lenpen, ...}
GET /health, GET /report (what was served so far). docs/server.md says what each answers. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from server_http import POLL, Server  # noqa: E402

import fairseq_moe_ext  # noqa: E402
from fairseq_moe_ext.checkpoints.errors import CheckpointError, ClosedError  # noqa: E402
from fairseq_moe_ext.serving.engine import Engine  # noqa: E402
from fairseq_moe_ext.serving.served import Served  # noqa: E402

logger = logging.getLogger("server")

IDLE = 0.05  # seconds that the worker sleeps at most, where nothing is to be translated


class Worker(threading.Thread):
    """The one thread that computes with the model; others give it calls, and sentences by `engine.submit`."""

    def __init__(self, served: Served, engine: Engine):
        super().__init__(name="worker", daemon=True)
        self.served, self.engine = served, engine
        self.failed = False
        self._calls: SimpleQueue[tuple[Future, Callable]] = SimpleQueue()

    def call(self, function: Callable) -> Future:
        """What `function` returns between two steps."""
        self._calls.put((found := Future(), function))
        return found

    def run(self) -> None:
        try:
            while True:
                self._answer()
                if self.engine.wait(IDLE):
                    self.engine.step()
                elif self.engine.closed:
                    break
        except ClosedError:
            pass
        except BaseException:
            logger.exception("the worker failed")
            self.failed = True
        finally:
            self.engine.close()
            self._answer()

    def _answer(self) -> None:
        while not self._calls.empty():
            future, function = self._calls.get()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)


# flag -> its default, and what it is
NUMBERS = {
    "--port": (8080, "0: any"),
    "--batch-size": (32, "sentences under way at a time"),
    "--max-waiting": (256, "sentences beyond"),
    "--max-beam": (10, "of one sentence"),
    "--max-texts": (64, "of one request"),
    "--max-body": (1 << 20, "bytes of one request"),
    "--connections": (512, "at a time"),
    "--timeout": (120.0, "seconds for a translation"),
    "--idle": (30.0, "seconds for a request to come"),
    "--drain": (30.0, "seconds at the end for what was asked"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint, as fairseq_moe_ext.load takes it")
    parser.add_argument("--data", help="folder of the dictionaries; default: the checkpoint's")
    parser.add_argument("--load", type=json.loads, default={}, help="more options of fairseq_moe_ext.load, as JSON")
    parser.add_argument("--host", default="127.0.0.1", help="%(default)s: reached from this machine alone")
    for flag, (default, meaning) in NUMBERS.items():
        parser.add_argument(flag, type=type(default), default=default, help=f"{meaning}; default: {default}")
    return parser.parse_args()


def main() -> int:
    args = parse()
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)  # fairseq has its own when it is imported
    signals: list[int] = []  # that came; a handler takes no lock, which this thread may hold

    try:
        served = fairseq_moe_ext.load(args.model, data=args.data, **args.load)
        limits = {name: getattr(args, name) for name in ("batch_size", "max_waiting", "max_beam")}
        engine = served.engine(**limits)
        worker = Worker(served, engine)
        server = Server(worker, args)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signals.append(number))
    worker.start()
    accepting = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL}, name="accepting")
    accepting.start()
    print(f"serving on http://{args.host}:{server.server_address[1]}", flush=True)
    while not signals and worker.is_alive():
        time.sleep(POLL)
    logger.info("closing: %d connections are open", server.connections)
    server.refuse_more()
    deadline = time.monotonic() + args.drain
    while server.connections and time.monotonic() < deadline and len(signals) < 2:
        time.sleep(POLL)
    engine.close()
    worker.join()
    server.server_close()
    served.close()
    return int(worker.failed)


if __name__ == "__main__":
    sys.exit(main())
