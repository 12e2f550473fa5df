"""Which token stands in which row of the embeddings: in Hugging Face's layout, in fairseq's, and from one to the other.

By name, never by position. Hugging Face: `<s> <pad> </s> <unk>`, the SentencePiece model's pieces from its number 3 on,
the language codes (`deu_Latn`), `<mask>`, what a user added; rows after that have no name. fairseq: the same four,
dict.txt, the language tokens (`__deu_Latn__`), what nllb_tokens.py adds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_moe_ext.checkpoints.dictionary_file import load_dictionary
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.hf_tokenizer import SPECIAL, read_tokenizer
from fairseq_moe_ext.nllb.tokens import ALL_EXTRA_TOKENS, DATA_SOURCE_TAGS, MASK, TAGS_OPTION

_FILLER = re.compile(r"madeupword\d{4,}")  # fairseq's own name of a row that is there for the number's sake


@dataclass(frozen=True)
class HfVocabulary:
    """names: token -> row, language codes as fairseq's tokens. pieces: SentencePiece's, in the rows' order.

    added: tokens that are neither pieces nor language codes, in the rows' order; `<mask>` among them.
    """

    names: dict[str, int]
    pieces: list[str]
    languages: list[str]
    added: list[str]

    @property
    def added_words(self) -> list[str]:
        """The added tokens without the mask, in their order."""
        return [token for token in self.added if token != MASK]


@dataclass(frozen=True)
class FairseqVocabulary:
    """Names of all rows: specials, dict.txt's words, language tokens, extra tokens, which `options` add.

    fillers: words that stand for rows without a name. tags_guessed: the extra tokens are NLLB-200's, by their number.
    """

    names: list[str]
    words: list[str]
    languages: list[str]
    options: str
    fillers: int = 0
    tags_guessed: bool = False

    @property
    def task_flags(self) -> str:
        """The options of fairseq's task that this vocabulary is served with."""
        return f"--encoder-langtok src --decoder-langtok {self.options}".strip()

    def texts(self) -> dict[str, str]:
        """The files that fairseq's commands read it from: dict.txt and langs.txt."""
        words = "".join(f"{word} 1\n" for word in self.words)
        return {"dict.txt": words, "langs.txt": "".join(f"{code}\n" for code in self.languages)}


def language_token(code: str) -> str:
    """How fairseq's dictionary names a language: `__deu_Latn__`."""
    return f"__{code}__"


def read_vocabulary(folder: Path) -> HfVocabulary:
    """By the tokenizer's files in the folder; CheckpointError where they do not name the embeddings' rows."""
    tokenizer = read_tokenizer(folder)
    names = {token: row for row, token in enumerate(SPECIAL)} | tokenizer.pieces
    for token, row in tokenizer.added.items():
        name = language_token(token) if token in tokenizer.languages else token
        if name in names:
            raise CheckpointError(f"{folder}: {name} must stand in one row, found {names[name]} and {row}")
        names[name] = row
    pieces = sorted(tokenizer.pieces, key=tokenizer.pieces.get)
    others = tokenizer.added.keys() - set(tokenizer.languages)
    return HfVocabulary(names, pieces, tokenizer.languages, sorted(others, key=tokenizer.added.get))


def read_dictionary(file: Path) -> list[str]:
    """The entries of a dict.txt, without the four specials."""
    return load_dictionary(file).symbols[len(SPECIAL) :]


def fairseq_vocabulary(theirs: HfVocabulary, words: Sequence[str] | None, rows: int) -> FairseqVocabulary:
    """All `rows` names, where the training's dict.txt holds `words`, None: the tokenizer's own; CheckpointError where
    there are more names than rows.

    Of NLLB-200, which has three rows after its languages and names none of them but one, wrongly, as <mask>, these are
    the three tags. Every other row that the tokenizer names, or that has no name, is a word of the dictionary.

    >>> fairseq_vocabulary(HfVocabulary({}, ["a"], ["de"], []), None, 9).names[4:]
    ['a', '__de__', '<MINED_DATA>', '<MMT_BT_DATA>', '<SMT_BT_DATA>']
    >>> fairseq_vocabulary(HfVocabulary({"<mask>": 6}, ["a"], ["de"], ["<mask>"]), ["a"], 8).names[4:]
    ['a', '<mask>', 'madeupword0000', '__de__']
    """
    what = "tokenizer" if words is None else "dictionary"
    words = list(theirs.pieces if words is None else words)
    known = set(words)
    words += [token for token in theirs.added_words if token not in known]
    known = {*SPECIAL, *words}
    tokens = [token for token in map(language_token, theirs.languages) if token not in known]
    room = rows - len(SPECIAL) - len(words) - len(tokens)
    if room < 0:
        raise CheckpointError(
            f"the {what} is of another vocabulary: its {len(words)} entries, {len(SPECIAL)} specials and "
            f"{len(theirs.languages)} languages are {rows - room}, the embeddings have {rows} rows"
        )
    if room == len(DATA_SOURCE_TAGS) and not known & {MASK, *DATA_SOURCE_TAGS}:
        names = [*SPECIAL, *words, *tokens, *DATA_SOURCE_TAGS]
        return FairseqVocabulary(names, words, theirs.languages, TAGS_OPTION, tags_guessed=True)
    if room > 0 and MASK not in known and theirs.names.get(MASK, rows) < rows:
        words.append(MASK)
    fillers = rows - len(SPECIAL) - len(words) - len(tokens)
    unused = (word for number in range(rows + 1) if (word := f"madeupword{number:04d}") not in known)
    words += [word for word, _ in zip(unused, range(fillers), strict=False)]
    return FairseqVocabulary([*SPECIAL, *words, *tokens], words, theirs.languages, "", fillers)


def hf_rows(vocabulary: HfVocabulary, names: Sequence[str]) -> list[int]:
    """For each of fairseq's `names` its row in Hugging Face's embeddings, which have as many.

    What stands after Hugging Face's last language and has another name in fairseq, or none in Hugging Face's layout,
    keeps its order: the real NLLB-200 has <MINED_DATA> where the tokenizer says <mask>.
    CheckpointError where a word is in one of the two alone.
    """
    known = _shared_names(vocabulary.names, names)
    taken = set(known.values())
    free = iter([row for row in range(len(names)) if row not in taken])
    return [known[name] if name in known else next(free) for name in names]


def _shared_names(theirs: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    ours = set(names)
    known = {name: row for name, row in theirs.items() if name != MASK or name in ours}
    foreign = [name for name in known if name not in ours]
    if foreign:
        raise CheckpointError(
            f"the dictionary is of another vocabulary: it lacks {len(foreign)} of the model's {len(known)} tokens, "
            f"the first is {min(foreign, key=known.get)!r:.80}"
        )
    beyond = max(known, key=known.get)
    if known[beyond] >= len(names):
        raise CheckpointError(
            f"the tokenizer is of another vocabulary: {beyond!r:.80} has row {known[beyond]}, the embeddings have "
            f"{len(names)} rows"
        )
    strangers = [name for name in names if name not in known and name not in ALL_EXTRA_TOKENS]
    strangers = [name for name in strangers if not _FILLER.fullmatch(name)]
    if strangers:
        raise CheckpointError(
            f"the dictionary is of another vocabulary: it has {strangers[0]!r:.80}, which the model has not"
        )
    return known
