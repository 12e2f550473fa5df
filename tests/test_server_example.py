"""examples/server.py asked over real sockets: the commands' translations, many clients at a time, and its end."""

import http.client
import json
import math
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import commands
import processes
import pytest
import torch
from fairseq.data import Dictionary, data_utils
from ties import Hypothesis, assert_same_hypotheses, of_lines

SCRIPT = commands.REPOSITORY / "examples" / "server.py"
COUNT = 8
SEARCH = {"beam": 4, "max_len_b": 14}
LONG = {"beam": 10, "min_len": 120, "max_len_b": 126}  # nearly all of the model's positions


class Server:
    """The script as a user starts it, on a port of its own."""

    def __init__(self, golden, *flags: object):
        load = json.dumps({"post_process": "sentencepiece", "cpu": True})
        command = [sys.executable, SCRIPT, golden / "checkpoint_last.pt", "--data", golden / "data-bin"]
        command += ["--load", load, "--port", "0", *flags]
        self._said, theirs = os.pipe()
        log, nothing = os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)
        self.process = processes.Process(command, (nothing, theirs, log), env=commands.environment())
        for end in (theirs, log, nothing):
            os.close(end)
        with open(os.dup(self._said), encoding="utf-8") as lines:
            self.port = int(lines.readline().rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, dict]:
        """Status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body).encode() if raw is None else raw)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def translate(self, text, **options) -> dict:
        status, answer = self.ask("POST", "/translate", {"text": text, **SEARCH, **options})
        assert status == 200, answer
        return answer

    def left(self, text, **options) -> socket.socket:
        """A connection on which a translation was asked for, and the answer is not waited for."""
        body = json.dumps({"text": text, **options}).encode()
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST /translate HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        return client

    def pending(self) -> int:
        return self.ask("GET", "/health")[1]["pending"]

    def wait_for(self, number: int) -> None:
        """Until so many requests have no answer."""
        end = time.monotonic() + 60
        while self.pending() != number:
            assert time.monotonic() < end
            time.sleep(0.02)

    def is_open(self) -> bool:
        """Whether a new client is let in."""
        try:
            return self.ask("GET", "/health")[0] == 200
        except ConnectionError:
            return False

    @property
    def decoder(self) -> dict:
        return self.ask("GET", "/report")[1]["decoder"]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._said)


@pytest.fixture(scope="module")
def golden(shared_goldens):
    return shared_goldens / "mt_plain"


@pytest.fixture(scope="module")
def server(golden):
    found = Server(golden, "--max-waiting", 20, "--max-body", 20_000, "--max-texts", 10)
    yield found
    assert found.end() == 0


@pytest.fixture(scope="module")
def texts(golden) -> list[str]:
    dictionary = Dictionary.load(str(golden / "data-bin" / "dict.en.txt"))
    data = data_utils.load_indexed_dataset(str(golden / "data-bin" / "test.en-de.en"), dictionary)
    return [dictionary.string(data[number]) for number in range(COUNT)]


@pytest.fixture(scope="module")
def expected(golden, texts) -> list[list[Hypothesis]]:
    """fairseq-interactive's detokenized lines, one sentence after the other."""
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_last.pt", "--cpu", "--task", "moe_translation")
    search = ("--remove-bpe", "sentencepiece", "--beam", 4, "--max-len-b", 14, "--nbest", 2)
    done = commands.run("interactive", *arguments, *search, stdin="\n".join(texts) + "\n")
    found = of_lines(commands.Generation(done.stdout.splitlines()))
    return [[Hypothesis(each.words, each.score) for each in found[number]] for number in range(COUNT)]


def hypotheses(answers: list[dict]) -> list[list[Hypothesis]]:
    return [[Hypothesis(each["text"], each["score"]) for each in answer["hypotheses"]] for answer in answers]


def at_once(functions) -> list:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [each.result() for each in [pool.submit(function) for function in functions]]


def test_clients_at_once_get_what_fairseq_interactive_says(server, texts, expected):
    found = at_once([lambda text=text: server.translate(text, nbest=2) for text in texts])
    assert_same_hypotheses(hypotheses(found), expected)
    assert all((each["text"], each["score"]) == tuple(each["hypotheses"][0].values()) for each in found)
    together = server.translate(texts, nbest=2)["translations"]
    assert_same_hypotheses(hypotheses(together), expected)


def test_eight_at_once_take_fewer_steps_than_eight_in_turn(server, texts):
    long = {"min_len": 28, "max_len_b": 30}  # so that all of them are there before the first is done
    counts = [server.decoder["steps"]]
    for text in texts:
        server.translate(text, **long)
        counts.append(server.decoder["steps"])
    at_once([lambda text=text: server.translate(text, **long) for text in texts])
    together = server.decoder["steps"] - counts[-1]
    alone = [after - before for before, after in zip(counts[:-1], counts[1:], strict=True)]
    assert max(alone) <= together < sum(alone) / 2


def test_a_failing_one_and_a_gone_one_among_eight_leave_the_others_right(server, texts, expected):
    sentences = server.ask("GET", "/report")[1]["generation"]["sentences"]
    refused = (lambda: server.ask("POST", "/translate", {"text": "▁a " * 500, **SEARCH}),)
    others = [number for number in range(COUNT) if number not in (1, 6)]
    asked = [lambda number=number: server.translate(texts[number], nbest=2) for number in others]
    gone = server.left(texts[1:2] * 10, **LONG)
    server.wait_for(10)
    with ThreadPoolExecutor(COUNT) as pool:
        found = [pool.submit(each) for each in (*refused, *asked)]
        time.sleep(0.1)
        gone.close()
        (status, answer), *found = [each.result() for each in found]
    assert status == 400 and answer == {
        "error": "a sentence must have at most 128 tokens, the model's and the task's positions, got 501"
    }
    assert_same_hypotheses(hypotheses(found), [expected[number] for number in others])
    server.wait_for(0)
    assert server.ask("GET", "/report")[1]["generation"]["sentences"] == sentences + len(others)


@pytest.mark.slow
def test_a_text_whose_scores_are_no_numbers_fails_alone(golden, texts, expected, tmp_path):
    dictionary = Dictionary.load(str(golden / "data-bin" / "dict.en.txt"))
    known = {word for text in texts if text != texts[2] for word in text.split()}
    word = next(each for each in texts[2].split() if each not in known)
    state = commands.read_state(golden / "checkpoint_merged.pt")
    state["model"]["encoder.embed_tokens.weight"][dictionary.index(word)] = math.nan
    torch.save(state, tmp_path / "checkpoint_last.pt")
    (tmp_path / "data-bin").symlink_to(golden / "data-bin")
    server = Server(tmp_path)
    try:
        asked = {**SEARCH, "nbest": 2}
        found = at_once([lambda text=text: server.ask("POST", "/translate", {"text": text, **asked}) for text in texts])
        listed = server.translate(texts, nbest=2)["translations"]
    finally:
        assert server.end() == 0
    (status, answer), broken = found.pop(2), listed.pop(2)
    assert status == 500 and answer == broken
    assert answer["error"].startswith("the translation is no number: values in float32 are not finite")
    for answers in ([answer for _, answer in found], listed):
        assert_same_hypotheses(hypotheses(answers), [each for number, each in enumerate(expected) if number != 2])


REFUSED = [
    (("POST", "/translate", {"text": 3}), 400, "text must be a string or a list of 1 to 10 strings"),
    (("POST", "/translate", {}), 400, "text must be a string or a list of 1 to 10 strings"),
    (("POST", "/translate", {"text": ["a"] * 11}), 400, "text must be a string or a list of 1 to 10 strings"),
    (("POST", "/translate", {"text": ["a", 1]}), 400, "text must be a string or a list of 1 to 10 strings"),
    (("POST", "/translate", ["a"]), 400, "the body must be a JSON object"),
    (("POST", "/translate", None, b"{"), 400, "the body must be a JSON object"),
    (("POST", "/translate", None, b'{"text": ' + b"[" * 9000), 400, "the body must be a JSON object"),
    (("POST", "/translate", None, b"\xff"), 400, "the body must be a JSON object"),
    (("POST", "/translate", {"text": "a" * 30_000}), 413, "a body must have at most 20000 bytes, got 30012"),
    (("POST", "/translate", {"text": "a", "beam": 11}), 400, "beam must be at most 10 here, got 11"),
    (("POST", "/translate", {"text": "a", "sampling": True}), 400, "sampling is no option of a request"),
    (("POST", "/translate", {"text": "a", "self": 1}), 400, "a request's options must be of beam, "),
    (("POST", "/translate", {"text": ["a", "▁a " * 500]}), 400, "text 1: a sentence must have at most 128 tokens"),
    (("POST", "/translate", {"text": "a", "target_lang": "fr"}), 400, "target_lang must be of the model's"),
    (("GET", "/nothing"), 404, "GET is for /health, /report; there is POST /translate, got /nothing"),
    (("POST", "/health", {}), 404, "POST is for /translate; there is GET /health, GET /report, got /health"),
    (("PUT", "/translate", {}), 501, "Unsupported method ('PUT')"),
]


@pytest.mark.parametrize(("asked", "status", "words"), REFUSED, ids=[str(row[0])[:60] for row in REFUSED])
def test_what_is_refused(server, asked, status, words):
    found, answer = server.ask(*asked)
    assert found == status and list(answer) == ["error"] and answer["error"].startswith(words)


def test_a_surrogate_and_an_empty_text_harm_nobody(server, texts, expected):
    status, answer = server.ask("POST", "/translate", None, b'{"text": "\\ud800", "max_len_b": 4}')
    assert status == 200 and isinstance(answer["text"], str)
    assert isinstance(server.translate("")["text"], str)
    assert_same_hypotheses(hypotheses([server.translate(texts[0], nbest=2)]), expected[:1])


@pytest.mark.slow
def test_a_full_queue_says_so_and_is_no_end(golden, texts, expected):
    limits = ("--batch-size", 1, "--max-waiting", 52, "--connections", 6, "--timeout", 4, "--idle", 1)
    server = Server(golden, *limits)
    try:
        slow = server.left(texts[:1] * 50, **LONG)
        server.wait_for(50)
        second = server.left(texts[:1] * 3, **LONG)
        server.wait_for(53)
        status, answer = server.ask("POST", "/translate", {"text": texts[1]})
        assert (status, answer["error"]) == (429, "at most 52 requests may wait, and as many do")
        second.close()
        server.wait_for(50)
        assert slow.recv(1 << 16).startswith(b"HTTP/1.0 504")
        server.wait_for(0)
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(6)]
        extra = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        assert extra.recv(1 << 16).startswith(b"HTTP/1.0 503")
        assert [each.recv(1 << 16) for each in silent] == [b""] * 6  # nothing was asked in time
        assert_same_hypotheses(hypotheses([server.translate(texts[0], nbest=2)]), expected[:1])
    finally:
        assert server.end(signal.SIGINT) == 0


def test_at_the_end_what_was_asked_is_answered_and_nothing_more(golden, texts):
    server = Server(golden)
    asked = server.left(texts[0], beam=4, min_len=100, max_len_b=110)
    idle = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    server.wait_for(1)
    server.process.send_signal(signal.SIGTERM)
    answer = b"".join(iter(lambda: asked.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.0 200") and json.loads(answer.split(b"\r\n\r\n", 1)[1])["text"]
    assert idle.recv(1 << 16) == b""
    assert server.process.wait(60) == 0
    assert not server.is_open()


def test_a_second_signal_does_not_wait_for_what_was_asked(golden, texts):
    server = Server(golden, "--batch-size", 1)
    asked = server.left(texts[:1] * 50, **LONG)
    server.wait_for(50)
    server.process.send_signal(signal.SIGTERM)
    while server.is_open():
        time.sleep(0.02)
    server.process.send_signal(signal.SIGINT)
    assert asked.recv(1 << 16).startswith(b"HTTP/1.0 503")
    assert server.process.wait(60) == 0


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "none.pt", "--data", tmp_path]
    done = processes.run(command, env=commands.environment())
    assert done.returncode == 1 and "none.pt" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_eight_at_once_take_less_time_than_eight_in_turn(server, texts):
    """Medians of five rounds each, in turn about; half the time leaves room for a busy machine."""
    alone, together = [], []
    for _ in range(5):
        start = time.perf_counter()
        for text in texts:
            server.translate(text)
        alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        at_once([lambda text=text: server.translate(text) for text in texts])
        together.append(time.perf_counter() - start)
    print(f"in turn {sorted(alone)[2]:.3f} s, at once {sorted(together)[2]:.3f} s")
    assert sorted(together)[2] < 0.75 * sorted(alone)[2]


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    script = commands.REPOSITORY / "scripts" / "benchmarks" / "benchmark_server.py"
    small = ("--model-dim", 64, "--layers", 4, "--sentences", 3, "--max-len", 5, "--rounds", 1, "--output", tmp_path)
    done = processes.run([sys.executable, script, *small], env=commands.environment())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmark_server.json").read_text())["rounds"]
    assert found["in turn"][0]["decoder steps"] == 3 * 6
    assert 6 <= found["at once"][0]["decoder steps"] <= 3 * 6
    assert found["at once"][0]["translations"] == found["in turn"][0]["translations"]
    assert (tmp_path / "benchmark_server.md").read_text() in done.stdout
