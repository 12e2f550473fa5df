"""What examples/server.py speaks over HTTP: connections, requests and their answers. Standard library only."""

from __future__ import annotations

import argparse
import json
import logging
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from fairseq_moe_ext.checkpoints.errors import ClosedError
from fairseq_moe_ext.serving.engine import FullError

if TYPE_CHECKING:
    from server import Worker

logger = logging.getLogger("server")

POLL = 0.1  # seconds between looks at whether a client that waits is still there
CLOSING = "the server is closing"
DISCARDED = 8 << 20  # bytes that are read at most of a body that is too large


class Refused(Exception):
    """An answer that is not the one asked for: its HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.status, self.headers = status, headers


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
