"""NLLB's translation end to end: what every peer has to do, and the figures of its rounds.

Sentences are rows of the embeddings, without a language, so that both sides are fed the same numbers. Every hypothesis
has the same number of tokens: a random model does not know when to stop.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from peers.environments import (
    ROOT,
    TRANSFORMERS_NLLB,
    EnvironmentMissing,
    main_environment,
    transformers_environment,
)
from peers.process import Peer, PeerFailed, rounds
from peers.table import ratio

OURS, THEIRS = "ours, moe_translation", f"transformers {TRANSFORMERS_NLLB} NllbMoe"
WORDS, EOS, FIRST_WORD = 8000, 2, 4
TASK = {"batch": 16, "beam": 4, "tokens": 24}
SENTENCES, LENGTHS = 32, (8, 32)


def measure_translation(threads: int, seed: int, seconds: float, log: Path, tell: Callable[[float], None]) -> dict:
    """Rows of the table, or why there are none."""
    try:
        return _measure(transformers_environment(TRANSFORMERS_NLLB, threads), threads, seed, seconds, log, tell)
    except (EnvironmentMissing, PeerFailed) as error:
        return {"left_out": str(error)}


def _measure(
    theirs: dict[str, str], threads: int, seed: int, seconds: float, log: Path, tell: Callable[[float], None]
) -> dict:
    script = Path(__file__).with_name("translation_model.py")
    folder = ROOT / "build" / f"peers-translation-{seed}-{zlib.crc32(script.read_bytes()):08x}"  # kept between runs
    making = [sys.executable, str(script), str(folder), str(seed), str(WORDS)]
    with open(log, "ab") as errors:
        subprocess.run(making, env=main_environment(threads), stdout=errors, stderr=errors, check=True)
    environments = {OURS: ("our_translation.py", main_environment(threads)), THEIRS: ("nllb_translation.py", theirs)}
    task = {**TASK, "folder": str(folder), "sources": sentences(seed)}
    with ExitStack() as stack:
        peers = {name: stack.enter_context(Peer(*each, log)) for name, each in environments.items()}
        hypotheses = [peer.prepare(task)["facts"]["hypotheses"] for peer in peers.values()]
        taken = rounds({name: partial(peer.seconds, "translate") for name, peer in peers.items()}, seconds, tell)
    same = sum(one == other for one, other in zip(*hypotheses, strict=True))
    different = len({tuple(each) for each in hypotheses[0]})
    generated = SENTENCES * (TASK["tokens"] + 1)
    rows = [
        {
            "implementation": name,
            "seconds": statistics.median(spent),
            "tokens_per_second": generated / statistics.median(spent),
            "times_ours": ratio(spent, taken[OURS]),
            "calls": len(spent),
        }
        for name, spent in taken.items()
    ]
    return {**TASK, "sentences": SENTENCES, "same_token_ids": same, "different_hypotheses": different, "rows": rows}


def sentences(seed: int) -> list[list[int]]:
    """Sentences of mixed lengths, the shortest first, as fairseq's batches have them; each ends with `</s>`."""
    drawn = random.Random(seed)
    lengths = sorted(drawn.randint(*LENGTHS) for _ in range(SENTENCES))
    return [[*(drawn.randrange(FIRST_WORD, WORDS) for _ in range(length)), EOS] for length in lengths]
