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
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fairseq_moe_ext  # noqa: E402
from fairseq_moe_ext.checkpoints.errors import CheckpointError, ClosedError  # noqa: E402
from fairseq_moe_ext.serving.engine import Engine, FullError  # noqa: E402
from fairseq_moe_ext.serving.served import Served  # noqa: E402

logger = logging.getLogger("server")

POLL = 0.1  # seconds between looks at whether a client that waits is still there
IDLE = 0.05  # seconds that the worker sleeps at most, where nothing is to be translated
CLOSING = "the server is closing"
DISCARDED = 8 << 20  # bytes that are read at most of a body that is too large


class Refused(Exception):
    """An answer that is not the one asked for: its HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.status, self.headers = status, headers


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


class Server(ThreadingHTTPServer):
    """One thread per connection, at most `limits.connections` of them."""

    daemon_threads = False  # their answers are waited for
    request_queue_size = 128

    def __init__(self, worker: Worker, limits: argparse.Namespace):
        self.worker, self.limits, self.closing = worker, limits, False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__((limits.host, limits.port), Handler)

    @property
    def connections(self) -> int:
        with self._lock:
            return len(self._open)

    def process_request(self, request, client_address) -> None:
        with self._lock:
            full = len(self._open) >= self.limits.connections
            if not full:
                self._open.add(request)
        if full:
            request.send(b"HTTP/1.0 503 Too many connections\r\nRetry-After: 1\r\n\r\n")
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("a connection failed")

    def refuse_more(self) -> None:
        """No new connection from now on, and nothing more is read from the open ones; what was asked is answered."""
        self.closing = True
        self.shutdown()
        self.socket.close()
        with self._lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RD)
                except OSError:  # its client has gone
                    pass


class Handler(BaseHTTPRequestHandler):
    """One request on a connection of its own."""

    server: Server
    server_version, sys_version = "fairseq_moe_ext", ""

    def setup(self) -> None:
        self.timeout = self.server.limits.idle
        super().setup()

    def do_GET(self) -> None:
        self._answer({"/health": self._health, "/report": self._report}, "POST /translate")

    def do_POST(self) -> None:
        self._answer({"/translate": self._translate}, "GET /health, GET /report")

    def _answer(self, known: dict[str, Callable[[], dict]], others: str) -> None:
        headers = {}
        try:
            if self.server.closing or not self.server.worker.is_alive():
                raise Refused(503, CLOSING)
            if self.path not in known:
                raise Refused(404, f"{self.command} is for {', '.join(known)}; there is {others}, got {self.path}")
            status, answer = 200, known[self.path]()
        except Refused as refused:
            status, headers, answer = refused.status, refused.headers, {"error": str(refused)}
        except ConnectionError:  # the client has gone
            self.log_message("gone")
            self.close_connection = True
            return
        except Exception:
            logger.exception("%s failed", self.path)
            status, answer = 500, {"error": "the server failed, its log says why"}
        self._send(status, answer, headers)

    def _send(self, status: int, answer: dict, headers: dict[str, str]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code, message=None, explain=None) -> None:
        """What the standard library refuses by itself."""
        self._send(int(code), {"error": message or self.responses[code][0]}, {})

    def _health(self) -> dict:
        return {"status": "ok", "pending": self.server.worker.engine.pending}

    def _report(self) -> dict:
        return self.server.worker.call(self.server.worker.served.report).result(self.server.limits.timeout)

    def _translate(self) -> dict:
        asked = self._body()
        text = asked.pop("text", None)
        texts = text if isinstance(text, list) else [text]
        most = self.server.limits.max_texts
        if not texts or len(texts) > most or not all(isinstance(each, str) for each in texts):
            raise Refused(400, f"text must be a string or a list of 1 to {most} strings")
        requests = self._submit(texts, asked, isinstance(text, list))
        try:
            self._wait(requests)
        finally:
            for request in requests:
                request.cancel()  # nothing where it has its result
        found = [self._result(request) for request in requests]
        if isinstance(text, list):
            return {"translations": found}
        if "error" in found[0]:
            raise Refused(500, found[0]["error"])
        return found[0]

    def _body(self) -> dict:
        length, most = self.headers.get("Content-Length"), self.server.limits.max_body
        if length is None:
            raise Refused(411, "Content-Length must be given")
        if not length.isascii() or not length.isdigit():
            raise Refused(400, f"Content-Length must be a number, got {length!r:.40}")
        if len(length) > 18 or int(length) > most:
            self._discard(int(length[:18]))
            raise Refused(413, f"a body must have at most {most} bytes, got {length:.40}")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, f"the body must come within {self.timeout} seconds") from None
        if len(body) < int(length):
            raise ConnectionAbortedError
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise Refused(400, "the body must be a JSON object")
        return asked

    def _discard(self, length: int) -> None:
        """A body that is not wanted is read all the same: its sender would not see the answer."""
        left = min(length, DISCARDED)
        try:
            while left > 0 and (part := self.rfile.read1(min(left, 1 << 16))):
                left -= len(part)
        except TimeoutError:
            pass

    def _submit(self, texts: list[str], options: dict, several: bool) -> list:
        engine, requests = self.server.worker.engine, []
        try:
            for text in texts:
                requests.append(engine.submit(text, **options))
        except Exception as error:
            for request in requests:
                request.cancel()
            if isinstance(error, FullError):
                raise Refused(429, str(error), Retry_After="1") from error
            if isinstance(error, ClosedError):
                raise Refused(503, CLOSING) from error
            if isinstance(error, ValueError):
                raise Refused(400, f"text {len(requests)}: {error}" if several else str(error)) from error
            raise
        return requests

    def _wait(self, requests: list) -> None:
        limit = self.server.limits.timeout
        deadline = time.monotonic() + limit
        while wait(requests, timeout=POLL).not_done:
            if self._is_gone():
                raise ConnectionAbortedError
            if time.monotonic() > deadline:
                raise Refused(504, f"the translation must be there within {limit} seconds, and is not")

    def _is_gone(self) -> bool:
        """Whether the client has closed its connection, on which nothing more is to come."""
        if self.server.closing:  # closed for reading here
            return False
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    @staticmethod
    def _result(request) -> dict:
        try:
            hypotheses = [{"text": each.text, "score": each.score} for each in request.result(timeout=0)]
        except CancelledError:
            raise Refused(503, CLOSING) from None
        except Exception as error:
            return {"error": str(error)}
        return {**hypotheses[0], "hypotheses": hypotheses}

    def log_message(self, words: str, *values) -> None:
        logger.info("%s %s", self.client_address[0], words % values)


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
