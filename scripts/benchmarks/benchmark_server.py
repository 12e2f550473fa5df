#!/usr/bin/env python3
"""Time examples/server.py under sentences that its clients send at once and in turn, with a model of NLLB-54B's shape.

    python scripts/benchmarks/benchmark_server.py                                   # scaled down, one thread
    python scripts/benchmarks/benchmark_server.py --model-dim 512 --sentences 16 --rounds 9 --output results

Every round sends the same sentences in turn, the next when the last is answered, and then at once; medians are given.
`seconds` are the clients' wall time, `CPU seconds` the server's, which other processes of a busy machine do not change.
Weights are random: an output has --max-len words. --output gets benchmark_server.json and benchmark_server.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from made_models import SHAPES, SOURCE_LENGTHS, scaled_vocabulary, write_checkpoint, write_data  # noqa: E402

from fairseq_moe_ext.atomic_file import write_json, write_text  # noqa: E402
from reproduction.tables import markdown  # noqa: E402

MEASURES = ("seconds", "CPU seconds", "decoder steps")


class Server:
    """examples/server.py over a made model, in a process of its own."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        shape = SHAPES["mt"]
        vocabulary = scaled_vocabulary(shape, args.model_dim, args.layers)
        data = write_data(folder / "data", shape, vocabulary, {"test": 1})
        model = write_checkpoint(folder / "model.pt", data, shape, args.model_dim, args.layers, "float32")
        command = [sys.executable, str(ROOT / "examples" / "server.py"), str(model), "--data", str(data)]
        command += ["--port", "0", "--load", json.dumps({"source_lang": "en", "target_lang": "de", "cpu": True})]
        self._log = open(folder / "log", "w+", encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, encoding="utf-8", env=environment
        )
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"the server did not start:\n{self._log.read()[-3000:]}")
        self._url = line.split()[-1]
        self.search = {"beam": args.beam, "max_len_b": args.max_len, "min_len": args.max_len}
        words = random.Random(1)
        lengths = [words.randint(*SOURCE_LENGTHS) for _ in range(args.sentences)]
        self.texts = [" ".join(f"w{words.randrange(vocabulary - 4)}" for _ in range(each)) for each in lengths]

    def translate(self, text: str) -> str:
        body = json.dumps({"text": text, **self.search}).encode()
        with urlopen(Request(f"{self._url}/translate", body)) as answer:
            return json.load(answer)["text"]

    def measures(self) -> tuple[float, float, int]:
        """The clock, the CPU time that the server has had, and its decoder steps."""
        with urlopen(f"{self._url}/report") as answer:
            steps = json.load(answer)["decoder"]["steps"]
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return time.perf_counter(), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"), steps

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()


def measured(server: Server, at_a_time: int) -> dict[str, float]:
    """One round, so many clients at a time."""
    before = server.measures()
    with ThreadPoolExecutor(at_a_time) as pool:
        translations = list(pool.map(server.translate, server.texts))
    found = dict(
        zip(MEASURES, (after - was for was, after in zip(before, server.measures(), strict=True)), strict=True)
    )
    return {**found, "translations": translations}


def table(rounds: dict[str, list[dict]]) -> str:
    """Medians, and what is in turn as a multiple of at once."""
    medians = {
        name: [statistics.median(each[what] for each in found) for what in MEASURES] for name, found in rounds.items()
    }
    body = [(name, f"{row[0]:.2f}", f"{row[1]:.2f}", f"{row[2]:.0f}") for name, row in medians.items()]
    ratios = [one / other for one, other in zip(medians["in turn"], medians["at once"], strict=True)]
    body.append(("in turn / at once", *(f"{each:.1f}" for each in ratios)))
    return markdown(("sentences", *MEASURES), body) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("--model-dim", 256), ("--layers", 4), ("--sentences", 8), ("--beam", 4), ("--max-len", 30)):
        parser.add_argument(flag, type=int, default=default, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the server; default: %(default)s")
    parser.add_argument("--output", type=Path, help="a folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args, Path(folder))
        try:
            server.translate(server.texts[0])
            rounds: dict[str, list[dict]] = {"in turn": [], "at once": []}
            for _ in range(args.rounds):
                rounds["in turn"].append(measured(server, 1))
                rounds["at once"].append(measured(server, len(server.texts)))
        finally:
            server.end()
    found = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        **{name: value for name, value in vars(args).items() if name != "output"},
        "rounds": rounds,
    }
    pairs = zip(rounds["in turn"], rounds["at once"], strict=True)
    others = sum(
        ours != theirs
        for one, other in pairs
        for ours, theirs in zip(one["translations"], other["translations"], strict=True)
    )
    text = f"{args.sentences} sentences, {args.threads} thread(s), {found['cpu']}; {others} translations are others\n\n"
    text += table(rounds)
    print(text)
    if args.output is not None:
        write_json(args.output / "benchmark_server.json", found, "--output")
        write_text(args.output / "benchmark_server.md", text, "--output")


if __name__ == "__main__":
    main()
