#!/usr/bin/env python3
"""This plugin beside its peers, in one run: one MoE layer at several sizes, and NLLB's translation end to end.

    python scripts/benchmarks/benchmark_peers.py                 # some six minutes, once the environments are made
    python scripts/benchmarks/benchmark_peers.py --quick         # our layer and fairscale's, small: half a minute

Layers: fairscale's MOELayer at the papers' capacity (a fraction of 1, of 0.05 for 512 experts), and the Mixtral block
of transformers 5 with its three implementations of experts. Mixtral's expert is a gated SwiGLU of three matrices; with
two thirds of the hidden dim its weights' bytes and its arithmetic are ours. All get the same tokens and the same gate,
hence the same load per expert. Each peer is also held against its own floor, measured in the same rounds: the same rows
through one expert, plus one read of the active experts' weights.

Translation: NllbMoe of transformers 4.57.6 and `moe_translation` with the same weights (a random model of NLLB's kind,
made here) over the same sentences; token ids are compared before the clock starts.

Every peer is a process of its own that stays alive; calls go round, one of each in turn. Medians; a ratio is the median
over the rounds of a call's time by ours in the same round. Outputs are checked first. Written to
results/peers/peers.{md,json}. Legend: T = tokens, E = experts, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from peers.environments import (  # noqa: E402
    ROOT,
    TRANSFORMERS_MIXTRAL,
    EnvironmentMissing,
    main_environment,
    transformers_environment,
)
from peers.process import Peer, prepare, rounds  # noqa: E402
from peers.table import layer_rows, machine, write_tables  # noqa: E402
from peers.translation import measure_translation  # noqa: E402

SHAPES = ((64, 256, 1024), (128, 512, 2048), (512, 256, 1024))  # E, D, F
TOKENS = (64, 256, 1024)
FRACTIONS = {512: 0.05}  # the papers' language models; all others 1


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    environments = dict.fromkeys(("our_layer.py", "fairscale_layer.py"), main_environment(args.threads))
    if not args.quick:
        try:
            environments["mixtral_layer.py"] = transformers_environment(TRANSFORMERS_MIXTRAL, args.threads)
        except EnvironmentMissing as error:
            print(error, file=sys.stderr)
    log = args.output / "peers.log"
    log.unlink(missing_ok=True)
    shapes = [(tokens, shape) for shape in SHAPES for tokens in TOKENS] if not args.quick else [(64, (8, 32, 64))]
    sizes = [size(tokens, shape, args.seed) for tokens, shape in shapes]
    content = {"machine": machine(args.threads)}
    content["layers"] = measure_layers(sizes, environments, args.seconds / len(sizes), log)
    if not args.quick:
        with Progress(1, "translation") as progress:
            progress.begin("")
            content["translation"] = measure_translation(
                args.threads, args.seed, args.translation_seconds, log, progress.tell
            )
    print(write_tables(args.output, content))


def size(tokens: int, shape: tuple[int, int, int], seed: int) -> dict:
    experts, model_dim, hidden_dim = shape
    named = {"tokens": tokens, "experts": experts, "model_dim": model_dim, "hidden_dim": hidden_dim, "seed": seed}
    return {**named, "capacity_fraction": FRACTIONS.get(experts, 1.0)}


def measure_layers(sizes: list[dict], environments: dict[str, dict], seconds: float, log: Path) -> list[dict]:
    """Per size its rows; a peer that cannot run says why in its row."""
    results = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        progress = stack.enter_context(Progress(len(sizes), "layers"))
        peers = {
            script: stack.enter_context(Peer(script, environment, log)) for script, environment in environments.items()
        }
        for case in sizes:
            progress.begin("T {tokens} E {experts} D {model_dim} F {hidden_dim}".format(**case))
            asked = {**case, "output": str(Path(folder) / "ours.pt")}
            answers = {script: prepare(peer, asked) for script, peer in peers.items()}
            calls = {
                (script, name): partial(peers[script].seconds, name)
                for script, answer in answers.items()
                for name in answer["calls"]
            }
            taken = rounds(calls, seconds, progress.tell)
            results.append({"size": case, "rows": layer_rows(answers, taken)})
    return results


class Progress(tqdm):
    """A bar over sizes, that moves within one."""

    def __init__(self, sizes: int, name: str):
        super().__init__(total=sizes, desc=name, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} {postfix}")
        self._begun = -1

    def begin(self, what: str) -> None:
        self._begun += 1
        self.set_postfix_str(what)
        self.tell(0.0)

    def tell(self, share: float) -> None:
        self.update(self._begun + share - self.n)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="of the layers' rounds, all sizes together")
    parser.add_argument("--translation-seconds", type=float, default=30.0, help="of the translations' rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="our layer and fairscale's alone, small")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "peers", help="the tables' folder")
    args = parser.parse_args()
    for name in ("seconds", "translation_seconds", "threads"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
