"""fairseq-generate's lines as texts, and what sacrebleu says of them."""

from __future__ import annotations

from dataclasses import dataclass

import sacrebleu


@dataclass(frozen=True)
class Translations:
    """Per sentence, in the order of their numbers: its number, the best hypothesis and the reference."""

    numbers: tuple[int, ...]
    hypotheses: tuple[str, ...]
    references: tuple[str, ...]

    @property
    def length_ratio(self) -> float:
        """Characters of the hypotheses over those of the references, spaces counted."""
        return sum(map(len, self.hypotheses)) / max(sum(map(len, self.references)), 1)

    def bleu(self, tokenizer: str = "13a", lowercase: bool = False) -> float:
        """Of the corpus, 0 to 100."""
        # whether the texts look tokenised is the caller's affair
        metric = sacrebleu.BLEU(tokenize=tokenizer, lowercase=lowercase, force=True)
        return metric.corpus_score(self.hypotheses, [self.references]).score

    def chrf(self, word_order: int = 0, lowercase: bool = False) -> float:
        """Of the corpus, 0 to 100; word_order 2 is chrF++."""
        metric = sacrebleu.CHRF(word_order=word_order, lowercase=lowercase)
        return metric.corpus_score(self.hypotheses, [self.references]).score


def read_translations(lines: str, kind: str = "D") -> Translations:
    """What fairseq-generate printed. kind: `H`, the hypothesis as tokens; `D`, put together as the user asked for it.

    Of several hypotheses of a sentence the first is the best. ValueError where a sentence lacks one, or there is none.
    """
    texts: dict[str, dict[int, str]] = {"T": {}, kind: {}}
    for line in lines.split("\n"):  # a text may hold other line ends
        letter, _, rest = line.partition("-")
        number, *fields = rest.split("\t", 1 if letter == "T" else 2)
        if letter in texts and number.isdecimal() and len(fields) == (1 if letter == "T" else 2):
            texts[letter].setdefault(int(number), fields[-1])
    if not texts["T"] or texts["T"].keys() != texts[kind].keys():
        raise ValueError(f"every T line must have {'an' if kind == 'H' else 'a'} {kind} line, and there must be one")
    numbers = sorted(texts["T"])
    hypotheses, references = (tuple(texts[letter][number] for number in numbers) for letter in (kind, "T"))
    return Translations(tuple(numbers), hypotheses, references)


def translation_quality(lines: str) -> dict[str, float]:
    """BLEU (13a) and chrF of texts whose tokens are apart by spaces already; ValueError as of `read_translations`."""
    found = read_translations(lines, "H")
    return {"bleu": found.bleu(), "chrf": found.chrf()}
