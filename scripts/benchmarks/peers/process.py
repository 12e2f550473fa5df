"""A peer's process from outside, and rounds in which every peer is called in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent


class PeerFailed(RuntimeError):
    """The peer's process ended, or could not prepare."""


class Peer:
    """A process of `script` (beside this file, see serve.py) in `environment`, alive until the context is left."""

    def __init__(self, script: str, environment: dict[str, str], log: Path):
        self.script, self._log = script, log
        with open(log, "ab") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self._process = subprocess.Popen([sys.executable, str(HERE / script)], env=environment, text=True, **pipes)

    def prepare(self, case: dict) -> dict:
        """calls: names; left_out: name -> why; facts."""
        return self._ask({"prepare": case})

    def seconds(self, call: str) -> float:
        """Of one call."""
        return self._ask({"call": call})["seconds"]

    def _ask(self, request: dict) -> dict:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise PeerFailed(f"{self.script} ended with {code} at {next(iter(request))}, see {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.script}: {answer['error']}")
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_error) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def prepare(peer: Peer, case: dict) -> dict:
    """The peer's answer; one that fails is left out and says why."""
    try:
        return peer.prepare(case)
    except PeerFailed as error:
        return {"calls": [], "left_out": {peer.script.removesuffix(".py"): str(error)}, "facts": {}}


def rounds(
    calls: dict[Hashable, Callable[[], float]], seconds: float, tell: Callable[[float], None]
) -> dict[Hashable, list[float]]:
    """Seconds of each call, all in turn, round after round; `calls` return their own seconds.

    A call that has had its equal share of `seconds` sits out, so that a slow one does not take the others' time; but it
    has 5 turns, or 2 where one alone is more than its share. tell: told the share of the time that is over.
    """
    taken: dict[Hashable, list[float]] = {name: [] for name in calls}
    share, begin = seconds / len(calls), time.perf_counter()
    in_turn = list(calls)

    def enough(spent: list[float]) -> bool:
        return len(spent) >= (2 if spent[0] > share else 5) and sum(spent) >= share

    while in_turn:
        for name in in_turn:
            taken[name].append(calls[name]())
        in_turn = [name for name in in_turn if not enough(taken[name])]
        tell(min(1.0, (time.perf_counter() - begin) / seconds))
    return taken
