"""From a user's text to a model's tokens and back, as fairseq-interactive does it."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.data import encoders


@dataclass(frozen=True)
class Hypothesis:
    """One result of generation, with the figures that fairseq-interactive prints: logarithms to the base 2.

    text: as a reader wants it. words: before the tokenizer put them together. score: of the whole, as the search
    compares it. positional_scores: of every token, the end included. alignment: (source, target) positions, empty
    without `print_alignment`.
    """

    text: str
    words: str
    score: float
    positional_scores: tuple[float, ...]
    alignment: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_plain(cls, fields: Sequence[Any]) -> Hypothesis:
        """Of what `dataclasses.astuple` and JSON made of one."""
        text, words, score, positional_scores, alignment = fields
        return cls(text, words, score, tuple(positional_scores), tuple(map(tuple, alignment)))


class TextCodec:
    """The tokenizer and BPE that `args` name, and the words that are no part of a result."""

    def __init__(self, task: Any, args: Namespace):
        self._task = task
        self._post_process = args.post_process
        self._tokenizer = encoders.build_tokenizer(args)
        self._bpe = encoders.build_bpe(args)

    def of(self, task: Any) -> TextCodec:
        """The same for a task of other dictionaries or languages."""
        found = copy.copy(self)
        found._task = task
        return found

    def encode(self, text: str) -> str:
        """As the model's dictionary knows the words."""
        for step in (self._tokenizer, self._bpe):
            if step is not None:
                text = step.encode(text)
        return text

    def decode(self, words: str) -> str:
        """Back from `encode`."""
        for step in (self._bpe, self._tokenizer):
            if step is not None:
                words = step.decode(words)
        return words

    def hypothesis(self, found: dict, generator: Any) -> Hypothesis:
        """What a generator found, for a reader.

        As fairseq's `post_process_prediction`, which would add every word that it has put together to the dictionary.
        """
        ignored = getattr(generator, "symbols_to_strip_from_output", {generator.eos})
        words = self._task.target_dictionary.string(
            found["tokens"].int().cpu(), self._post_process, extra_symbols_to_ignore=ignored
        )
        scores = found["positional_scores"].div(math.log(2)).tolist()
        alignment = found["alignment"]
        pairs = () if alignment is None else tuple((int(source), int(target)) for source, target in alignment)
        return Hypothesis(self.decode(words), words, float(found["score"] / math.log(2)), tuple(scores), pairs)
