#!/usr/bin/env python3
"""Which experts the next MoE layer will want: how often each predictor is right, what prefetching by it gains.

    OMP_NUM_THREADS=1 python scripts/benchmarks/measure_predictors.py --model model.pt --data data-bin --text test.en \\
        --batch-size 1 8 64

Serves the text with beam 4, or scores it under --score. Predictors that are fitted (the hot set of a language, the
table by token) see the first half of the lines; all are tested on the second half. A line that begins with a language
token (__ja__) is of that language. Then the second half is played by the clocks of buffering/replay.py with a quarter
of the experts resident. Nothing about a served run is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from heard_passes import INPUT, RESIDUAL, HeardCall, heard  # noqa: E402

from fairseq_moe_ext.buffering.eviction import Buffer  # noqa: E402
from fairseq_moe_ext.buffering.foresight import Foresight, misses_with_foresight  # noqa: E402
from fairseq_moe_ext.buffering.model_calls import ModelCall, following_layers  # noqa: E402
from fairseq_moe_ext.buffering.prefetchers import (  # noqa: E402
    LastStep,
    NextLayers,
    Nothing,
    Oracle,
    Predicted,
    Prefetcher,
)
from fairseq_moe_ext.buffering.rates import Costs, Rates  # noqa: E402
from fairseq_moe_ext.buffering.replay import replay  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.command_line.replay_table import Slots, buffers_for  # noqa: E402

AT = (2, 4, 8)  # experts that are guessed
LAST, HOT, TABLE = "last step's experts", "the language's hot set", "table by token id"
PREDICTORS = (INPUT, RESIDUAL, LAST, HOT, TABLE)
DISKS = (0.25, 1, 4)  # how much faster than the balanced one; the balanced one is among them
LEAST_EXPECTED = 0.1  # rows, below which an expert is not prefetched


class TokenTable:
    """Per layer how often each token id, and each language, chose each expert; fitted on calls of one sentence each.

    As SiDA's offline hash table (arXiv 2310.18859), with counts in the place of its network.
    """

    def __init__(self, calls: Sequence[HeardCall]):
        size = 1 + max(int(call.tokens.max()) for call in calls)
        self._counts: dict[str, np.ndarray] = {}
        self._by_language: dict[tuple[str, int], np.ndarray] = {}
        for call in calls:
            counts = self._counts.setdefault(call.layer, np.zeros((size, call.num_experts)))
            for choices in call.experts.T:
                ran = choices >= 0
                np.add.at(counts, (call.tokens[ran], choices[ran]), 1)
            for language in set(call.languages):
                load = self._by_language.setdefault((call.layer, language), np.zeros(call.num_experts))
                load += call.as_model_call().load
        self._hot = {layer: counts.sum(0) for layer, counts in self._counts.items()}

    def of_languages(self, layer: str, languages: Sequence[int]) -> np.ndarray:
        """(E,) that tokens of these languages chose, each counted as often as it is named; of all, where none is."""
        known = [self._by_language[layer, each] for each in languages if (layer, each) in self._by_language]
        return np.sum(known, axis=0) if known else self._hot[layer]

    def expected(self, layer: str, tokens: np.ndarray, choices: int) -> np.ndarray:
        """(T, E) expected rows of each token; of one that was never seen as all tokens have it."""
        counts = self._counts[layer]
        known = np.where(tokens < len(counts), tokens, 0)
        rows = np.where((tokens < len(counts))[:, None], counts[known], 0)
        rows = np.where(rows.sum(1, keepdims=True) > 0, rows, self._hot[layer])
        return choices * rows / np.maximum(rows.sum(1, keepdims=True), 1)


def ranked(scores: np.ndarray) -> np.ndarray:
    """scores (..., E) -> the experts, largest first; equals by number."""
    return np.argsort(-scores, axis=-1, kind="stable")


@dataclass
class Said:
    """What a predictor says of a call: by_token (T, M) or (M,), likeliest experts first; of_call (E,) expected rows."""

    by_token: np.ndarray
    of_call: np.ndarray


def said_of(calls: Sequence[HeardCall], table: TokenTable) -> list[dict[str, Said]]:
    """Per call what each predictor says of it."""
    found, last = [], {}
    for number, call in enumerate(calls):
        said: dict[str, Said] = {}
        if number and calls[number - 1].step == call.step:
            said |= {kind: Said(each.ranked, each.expected) for kind, each in calls[number - 1].guesses.items()}
        if call.layer in last:
            said[LAST] = Said(ranked(last[call.layer]), last[call.layer])
        hot = table.of_languages(call.layer, call.languages)
        said[HOT] = Said(ranked(hot), hot)
        rows = table.expected(call.layer, call.tokens, call.experts.shape[1])
        said[TABLE] = Said(ranked(rows), rows[call.experts[:, 0] >= 0].sum(0))
        last[call.layer] = call.as_model_call().load
        found.append(said)
    return found


def recall(calls: Sequence[HeardCall], said: Sequence[dict[str, Said]], kind: str, at: int) -> float:
    """The share of all assignments whose expert is among the token's `at` likeliest."""
    right = total = 0
    for call, each in zip(calls, said, strict=True):
        if kind in each:
            guessed = each[kind].by_token[..., :at]
            guessed = np.broadcast_to(guessed, (len(call.tokens), guessed.shape[-1]))
            ran = call.experts >= 0
            right += int(((call.experts[:, :, None] == guessed[:, None, :]).any(2) & ran).sum())
            total += int(ran.sum())
    return right / total if total else float("nan")


def in_vain(calls: Sequence[HeardCall], said: Sequence[dict[str, Said]], kind: str, at: int) -> float:
    """The share of idle experts among the `at` of a call that most rows are expected of: what is read in vain of them,
    were none resident."""
    idle = total = 0
    for call, each in zip(calls, said, strict=True):
        if kind in each:
            guessed = ranked(each[kind].of_call)[:at]
            idle += int((call.as_model_call().load[guessed] == 0).sum())
            total += len(guessed)
    return idle / total if total else float("nan")


def scores_of(
    calls: Sequence[HeardCall], following: Sequence[str], kind: str, table: TokenTable
) -> list[tuple[str, np.ndarray] | None]:
    """For `Predicted`: what is known of the next call; by the table once its tokens are known. following: per call the
    layer that comes next as far as a model knows."""
    found: list[tuple[str, np.ndarray] | None] = []
    for number, call in enumerate(calls):
        if kind == HOT:
            found.append((following[number], table.of_languages(following[number], call.languages)))
            continue
        if kind == TABLE and number + 1 < len(calls):
            coming = calls[number + 1]
            real = coming.experts[:, 0] >= 0
            expected = table.expected(coming.layer, coming.tokens[real], coming.experts.shape[1]).sum(0)
            layer = coming.layer
        elif kind in call.guesses:
            layer, expected = call.guesses[kind].layer, call.guesses[kind].expected
        else:
            found.append(None)
            continue
        found.append((layer, np.where(expected >= LEAST_EXPECTED, expected, 0)))
    return found


def last_where_unknown(
    calls: Sequence[ModelCall], heard_calls: Sequence[HeardCall], following: Sequence[str], kind: str, table: TokenTable
) -> list[tuple[str, np.ndarray] | None]:
    """As `scores_of`; where that knows nothing, as of the first MoE layer of a pass, the experts of its last call."""
    found, last = [], {}
    for number, known in enumerate(scores_of(heard_calls, following, kind, table)):
        last[calls[number].layer] = calls[number].load
        layer = following[number]
        found.append(known if known is not None or layer not in last else (layer, last[layer]))
    return found


def prefetchers(heard_calls: Sequence[HeardCall], calls: Sequence[ModelCall], table: TokenTable) -> dict:
    """name -> Prefetcher; the last two know the future."""
    following = following_layers(calls)
    found: dict[str, Prefetcher] = {"off": Nothing(), "layers": NextLayers(calls), LAST: LastStep(calls)}
    for kind in (INPUT, RESIDUAL, HOT, TABLE):
        late = kind in (RESIDUAL, TABLE)
        found[kind] = Predicted(scores_of(heard_calls, following, kind, table), is_late=late)
    for kind in (INPUT, RESIDUAL):
        found[f"{kind}, else {LAST}"] = Predicted(last_where_unknown(calls, heard_calls, following, kind, table), True)
    return found | {"oracle, next call": Oracle(calls), "oracle, all calls": Oracle(calls, None)}


def balanced(calls: Sequence[ModelCall], buffers: Callable[[], dict], faster: float) -> Rates:
    """An expert's computation takes 1, a row 0.01, all else of a call 10. With `faster` 1 the disk reads what is missed
    in just the time that the run takes where all is resident, so that a perfect prefetch has all of it to gain."""
    told = {"expert_seconds": 1.0, "row_seconds": 0.01, "dense_seconds": 10.0}
    costs = sum(replay(calls, buffers(), Rates(1, 1, **told)).values(), Costs())
    return Rates(1, faster * max(1, costs.misses) / costs.resident, **told)


def replayed(heard_calls: Sequence[HeardCall], table: TokenTable, alone: bool) -> list[tuple]:
    """Per prefetcher, with a quarter of the experts resident under the default policy: seconds over those of `off` with
    each disk; with the balanced disk those of the encoder, the share that is waited, and reads in vain over misses.

    alone: whether a prefetch begins only while no needed copy is on its way."""
    calls = [call.as_model_call() for call in heard_calls]

    def buffers() -> dict[str, Buffer | Foresight]:
        return buffers_for(calls, None, "lfu", "resident-first", {})

    shares: dict[str, list[str]] = {}
    more: dict[str, tuple[str, ...]] = {}
    for faster in DISKS:
        rates, off = balanced(calls, buffers, faster), None
        for name, prefetcher in prefetchers(heard_calls, calls, table).items():
            kept = buffers()
            phases = replay(calls, kept, rates, prefetcher, ahead=Slots().ahead_of(kept, calls), alone=alone)
            costs, encoder = sum(phases.values(), Costs()), phases.get("encoder", Costs()).seconds
            off = off or (costs.seconds, encoder)
            shares.setdefault(name, []).append(f"{costs.seconds / off[0]:.3f}")
            if faster == 1:
                waited, vain = costs.waited / costs.seconds, costs.in_vain / max(1, costs.misses)
                more[name] = f"{encoder / off[1]:.3f}" if encoder else "", f"{waited:.3f}", f"{vain:.2f}"
    return [(name, *each, *more[name]) for name, each in shares.items()]


def quarter_misses(calls: Sequence[ModelCall]) -> list[tuple]:
    """Per layer with a quarter of its experts: turns, MIN, and multiples of MIN by lfu and by what knows some calls."""
    found = []
    for layer in dict.fromkeys(call.layer for call in calls):
        batches = [call.active() for call in calls if call.layer == layer]
        size = max(1, len(next(call.load for call in calls if call.layer == layer)) // 4)
        buffer = Buffer(size, "lfu", "resident-first", range(size))
        lfu = sum(not access.hit for batch in batches for access in buffer.run(batch))
        known = [misses_with_foresight(batches, size, range(size), horizon) for horizon in (0, 1, 2, 4, 8, 16, None)]
        least = max(1, known[-1])
        multiples = [f"{each / least:.2f}" for each in (lfu, *known[:-1])]
        active = np.mean([len(batch) for batch in batches])
        found.append((layer, len(batches), f"{active:.1f}", sum(map(len, batches)), known[-1], *multiples))
    return found


def predictor_rows(calls: Sequence[HeardCall], said: Sequence[dict[str, Said]]) -> list[tuple]:
    """Per predictor recall and reads in vain at 2, 4 and 8."""
    rows = [(kind, [what(calls, said, kind, at) for what in (recall, in_vain) for at in AT]) for kind in PREDICTORS]
    return [(kind, *(f"{share:.2f}" for share in shares)) for kind, shares in rows]


def serve(served, lines: Sequence[str], args: argparse.Namespace, batch_size: int) -> list[HeardCall]:
    """What the layers were heard to choose."""
    with heard(served) as listener:
        if args.score:
            served.score(lines, batch_size=batch_size)
        else:
            served.translate(lines, batch_size=batch_size, **{"beam": 4, **args.search})
    return listener.calls


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=positive, default=400)
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--score", action="store_true", help="score the text in place of translating or continuing it")
    parser.add_argument("--options", type=json.loads, default={}, help="of load(), as JSON")
    parser.add_argument("--search", type=json.loads, default={}, help="of translate(), as JSON")
    args = parser.parse_args()
    from fairseq_moe_ext.serving.load import load

    torch.set_num_threads(1)
    lines = args.text.read_text(encoding="utf-8").splitlines()[: args.lines]
    half = len(lines) // 2
    heads = [f"{what} at {at}" for what in ("recall", "in vain") for at in AT]
    with load(args.model, data=args.data, cpu=True, **args.options) as served:
        table = TokenTable(serve(served, lines[:half], args, 1))
        for batch_size in args.batch_size:
            calls = serve(served, lines[half:], args, batch_size)
            said = said_of(calls, table)
            inner = [number for number, each in enumerate(said) if INPUT in each]
            print(f"\nbatch {batch_size}: all {len(calls)} calls")
            print(tabulate(predictor_rows(calls, said), ("predictor", *heads), "github", disable_numparse=True))
            if inner:
                print(f"\nbatch {batch_size}: the {len(inner)} calls that have a MoE layer before them in their pass")
                rows = predictor_rows([calls[number] for number in inner], [said[number] for number in inner])
                print(tabulate(rows, ("predictor", *heads), "github", disable_numparse=True))
            head = ("prefetch", *(f"disk x {faster}" for faster in DISKS), "encoder", "waited", "in vain over misses")
            for alone, how in ((True, "alone"), (False, "beside needed copies")):
                print(f"\nbatch {batch_size}: a quarter of the experts resident, prefetches {how}")
                print(tabulate(replayed(calls, table, alone), head, "github", disable_numparse=True))
            known = [f"next {horizon} known" for horizon in (0, 1, 2, 4, 8, 16)]
            head = ("layer", "calls", "active", "turns", "MIN", "lfu over MIN", *known)
            rows = quarter_misses([call.as_model_call() for call in calls])
            print(f"\n{tabulate(rows, head, 'github', disable_numparse=True)}", flush=True)


if __name__ == "__main__":
    main()
