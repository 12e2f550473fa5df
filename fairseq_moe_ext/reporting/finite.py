"""Values that are no numbers (NaN, infinity): where they begin, how often they come, and what they made of results.

A row of scores that is not finite must not win nor hang a search: its beam ends at once, behind every other. What comes
out of the search is a number or NaN, never a stand-in.
Legend: R = rows (beams), V = vocabulary, L = positions, B = sentences, D = model dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

_MOST_NAMED = 5


class NotFiniteError(Exception):
    """What was asked for came out as no number: names the dtype, the layer and the sentences."""


@dataclass
class NonFinite:
    """passes: of a stack in which a value was not finite; first_layer: where, in the first of them, in the order of the
    computation; beams: rows of scores that a search gave up; results: sentences (blocks of a language model) whose
    score is no number.
    """

    passes: int = 0
    first_layer: str | None = None
    beams: int = 0
    results: int = 0

    def __bool__(self) -> bool:
        return bool(self.passes or self.beams or self.results)

    def add(self, other: NonFinite) -> None:
        """Add what another rank met."""
        self.first_layer = self.first_layer or other.first_layer
        for name in ("passes", "beams", "results"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def describe(self, dtype: str, has_experts: bool = True) -> str:
        """What the error or the report says, with the dtype to take instead; dtype: PyTorch's name without `torch.`."""
        where = f", first in {self.first_layer}" if self.first_layer else ""
        wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype)
        advice = f"--moe-dtype {wider}" if has_experts else "float32, without --fp16,"
        advice = f"; {advice} has the wider range" if wider else ""
        return f"values in {dtype} are not finite{where}{advice}"


class PassOutputs:
    """The outputs of one pass's layers, of which only sums are kept until the pass ends."""

    def __init__(self) -> None:
        self._sums: list[tuple[str, Tensor]] = []

    def add(self, name: str, output: Tensor) -> None:
        """output (L, B, D): what the layer called `name` gives."""
        self._sums.append((name, output.detach().sum(dim=-1, dtype=torch.float32)))

    def first_not_finite(self, real: Tensor | None = None) -> str | None:
        """The first layer with a value that is not finite at a real position; None: there is none. Begins anew.

        real (B, L) bool, False on padding, whose values reach no result; None: every position is real.
        """
        taken, self._sums = self._sums, []
        if not taken or bool(torch.stack([sums.sum() for _, sums in taken]).sum().isfinite()):
            return None
        for name, sums in taken:
            wrong = ~sums.isfinite()
            if bool((wrong if real is None else wrong & real.t()).any()):
                return name
        return None


class FiniteSearch:
    """Keeps rows of scores that are not finite out of one generator's search."""

    def __init__(self, generator: SequenceGenerator):
        self._model, self._eos = generator.model, generator.eos
        # what a broken row scores: its beam is to end at once, later in the list than any other that ends, and no
        # beam that is whole has such scores. Sampling draws, so that only what is likely ends the beam
        sampling = isinstance(generator.search, Sampling)
        self._any_word, self._end = (-50.0, 60.0) if sampling else (-1e9, -5e8)
        self._broken: Tensor | int = 0  # rows so far, on the device
        self._counted = 0

    @contextmanager
    def around(self) -> Iterator[None]:
        """In this context the search sees finite scores; of a search that raises nothing is counted."""
        forward = self._model.forward_decoder

        def forward_decoder(*args, **kwargs):
            scores, attention = forward(*args, **kwargs)  # (R, V)
            broken = scores[:, :1].isnan()  # a log-softmax is NaN everywhere if it is anywhere
            if scores.is_cuda or bool(broken.any()):  # on a GPU asking would wait for it
                self._broken = self._broken + broken.sum()
                scores.masked_fill_(broken, self._any_word)
                scores[:, self._eos : self._eos + 1].masked_fill_(broken, self._end)
            return scores, attention

        self._model.forward_decoder = forward_decoder
        try:
            yield
        except BaseException:
            self._broken = self._counted
            raise
        finally:
            del self._model.forward_decoder

    def count(self) -> int:
        """Rows that were broken since the last call."""
        total = int(self._broken)
        new, self._counted = total - self._counted, total
        return new

    def without_broken(self, hypotheses: list[list[dict]]) -> list[list[dict]]:
        """Without the hypotheses of broken beams; a sentence that has no other keeps one, its scores NaN."""
        return [self._whole(sentence) for sentence in hypotheses] if self._counted else hypotheses

    def _whole(self, sentence: list[dict]) -> list[dict]:
        whole = [each for each in sentence if not self._stands_in(each["positional_scores"]).any()]
        if whole or not sentence:
            return whole
        scores = sentence[0]["positional_scores"]
        # what follows a stand-in is the difference of two sums that have no digits left for it
        scores = scores.masked_fill(self._stands_in(scores).cumsum(0) > 0, float("nan"))
        return [{**sentence[0], "score": scores.sum(), "positional_scores": scores}]

    def _stands_in(self, scores: Tensor) -> Tensor:
        """Also a word of a row whose end was forbidden (a prefix, `--min-len`)."""
        return (scores < -1e8) | (scores > 40) | ((scores - self._any_word).abs() < 1e-3)


@dataclass
class Results:
    """The sentences or blocks that were served, and those of them whose score is no number."""

    served: int = 0
    broken: list[int] = field(default_factory=list)

    def add(self, hypotheses: list[list[dict]], numbers: Sequence[int]) -> int:
        """hypotheses: per sentence, best first; numbers: the sentences'. Returns how many are no number."""
        scores = [sentence[0]["positional_scores"].sum() if sentence else None for sentence in hypotheses]
        self.served += len(hypotheses)
        if None not in scores and (not scores or bool(torch.stack(scores).sum(dtype=torch.float64).isfinite())):
            return 0
        pairs = zip(numbers, scores, strict=True)
        found = [number for number, score in pairs if score is None or not bool(score.isfinite())]
        self.broken += found
        return len(found)

    def check(self, why: str) -> None:
        """Raise NotFiniteError where a result is no number."""
        if not self.broken:
            return
        named = ", ".join(map(str, sorted(self.broken)[:_MOST_NAMED]))
        more = ", ..." if len(self.broken) > _MOST_NAMED else ""
        raise NotFiniteError(
            f"{len(self.broken)} of {self.served} results are not numbers (sentence {named}{more}): {why}"
        )
