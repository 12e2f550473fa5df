"""Which token stands in which row of the embeddings: in Hugging Face's layout, in fairseq's, and from one to the other.

By name, never by position. Hugging Face: `<s> <pad> </s> <unk>`, the SentencePiece model's pieces from its number 3 on,
the language codes (`deu_Latn`), `<mask>`; rows after that have no name there. fairseq: the same four, dict.txt, the
language tokens (`__deu_Latn__`), what nllb_tokens.py adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq.data import Dictionary
from sentencepiece import SentencePieceProcessor

from fairseq_moe_ext.serving.errors import CheckpointError, one_line
from fairseq_moe_ext.serving.hf_folder import read_json
from fairseq_moe_ext.serving.nllb_tokens import ALL_EXTRA_TOKENS, MASK, option_sets

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
TOKENIZER_FILES = (
    *("sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "added_tokens.json"),
)


@dataclass(frozen=True)
class HfVocabulary:
    """names: token -> row, language codes as fairseq's tokens. pieces: SentencePiece's, in the rows' order."""

    names: dict[str, int]
    pieces: list[str]
    languages: list[str]


@dataclass(frozen=True)
class FairseqVocabulary:
    """Names of all rows: specials, dict.txt's words, language tokens, extra tokens, which `options` add."""

    names: list[str]
    words: list[str]
    languages: list[str]
    options: str


def language_token(code: str) -> str:
    return f"__{code}__"


def read_vocabulary(folder: Path) -> HfVocabulary:
    """By the folder's SentencePiece model, or by tokenizer.json; CheckpointError where neither is readable."""
    spm, fast = folder / "sentencepiece.bpe.model", folder / "tokenizer.json"
    content = read_json(fast) if fast.is_file() else {}
    if spm.is_file():
        pieces = _read_pieces(spm)
        names = {piece: len(SPECIAL) + number for number, piece in enumerate(pieces)}
    elif isinstance(content.get("model", {}).get("vocab"), dict):
        vocab: dict[str, int] = content["model"]["vocab"]
        added = {entry["content"] for entry in content.get("added_tokens", [])}
        names = {piece: row for piece, row in vocab.items() if piece not in added and row >= len(SPECIAL)}
        pieces = sorted(names, key=names.get)
    else:
        raise CheckpointError(f"{folder}: it must hold {spm.name} or {fast.name}, which name the embeddings' rows")
    names |= {name: row for row, name in enumerate(SPECIAL)}
    codes = _added_tokens(folder, content, first=len(SPECIAL) + len(pieces))
    languages = [code for code in sorted(codes, key=codes.get) if code != MASK and code not in SPECIAL]
    for code, row in codes.items():
        name = code if code == MASK or code in SPECIAL else language_token(code)
        if names.get(name, row) != row:
            raise CheckpointError(f"{folder}: {name} must stand in one row, found {names[name]} and {row}")
        names[name] = row
    if len(set(names.values())) != len(names):
        raise CheckpointError(f"{folder}: the tokenizer's files give two tokens one row")
    return HfVocabulary(names, pieces, languages)


def _read_pieces(file: Path) -> list[str]:
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model: {one_line(error)}") from error
    pieces = [model.id_to_piece(number) for number in range(len(model))]
    if pieces[:3] != ["<unk>", "<s>", "</s>"]:
        raise CheckpointError(f"{file}: its first pieces must be <unk>, <s> and </s>, got {pieces[:3]}")
    return pieces[3:]


def _added_tokens(folder: Path, fast: dict, first: int) -> dict[str, int]:
    """Token -> row of what the tokenizer has beyond its pieces."""
    if fast.get("added_tokens"):
        return {entry["content"]: entry["id"] for entry in fast["added_tokens"]}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if content.get("added_tokens_decoder"):
            return {entry["content"]: int(row) for row, entry in content["added_tokens_decoder"].items()}
        if content.get("additional_special_tokens"):
            tokens = content["additional_special_tokens"]
            codes = [token if isinstance(token, str) else token["content"] for token in tokens]
            return {code: first + number for number, code in enumerate([*(c for c in codes if c != MASK), MASK])}
    raise CheckpointError(
        f"{folder}: its language codes stand in none of tokenizer.json, tokenizer_config.json, special_tokens_map.json"
    )


def read_dictionary(file: Path) -> list[str]:
    """The entries of a dict.txt, without the four specials."""
    try:
        return Dictionary.load(str(file)).symbols[len(SPECIAL) :]
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a fairseq dictionary: {one_line(error)}") from error


def fairseq_vocabulary(words: Sequence[str], languages: Sequence[str], rows: int) -> FairseqVocabulary:
    """All `rows` names, where dict.txt holds `words`; CheckpointError where no options of NLLB's make up the number.

    >>> fairseq_vocabulary(["a"], ["de"], 9).names[4:]
    ['a', '__de__', '<MINED_DATA>', '<MMT_BT_DATA>', '<SMT_BT_DATA>']
    """
    names = [*SPECIAL, *words]
    known = set(names)
    names += [token for token in map(language_token, languages) if token not in known]
    for options, tokens in option_sets():
        extra = [token for token in tokens if token not in known]
        if len(names) + len(extra) == rows:
            return FairseqVocabulary([*names, *extra], list(words), list(languages), options)
    raise CheckpointError(
        f"the dictionary is of another vocabulary: its {len(words)} entries, {len(SPECIAL)} specials and "
        f"{len(languages)} languages are {len(names)}, the embeddings have {rows} rows, and no options add "
        f"{rows - len(names)}"
    )


def hf_rows(vocabulary: HfVocabulary, names: Sequence[str]) -> list[int]:
    """For each of fairseq's `names` its row in Hugging Face's embeddings, which have as many.

    What stands after Hugging Face's last language and has another name in fairseq, or none in Hugging Face's layout,
    keeps its order: the real NLLB-200 has <MINED_DATA> where the tokenizer says <mask>.
    CheckpointError where a word is in one of the two alone.
    """
    known = {name: row for name, row in vocabulary.names.items() if name != MASK or name in names}
    foreign = [name for name in known if name not in set(names)]
    if foreign:
        raise CheckpointError(
            f"the dictionary is of another vocabulary: it lacks {len(foreign)} of the model's {len(known)} tokens, "
            f"the first is {min(foreign, key=known.get)!r}"
        )
    taken = set(known.values())
    free = iter([row for row in range(len(names)) if row not in taken])
    unnamed = [name for name in names if name not in known]
    strangers = [name for name in unnamed if name not in ALL_EXTRA_TOKENS]
    if strangers or max(taken) >= len(names):
        what = f"{strangers[0]!r}, which the model has not" if strangers else f"{len(names)} entries"
        raise CheckpointError(f"the dictionary is of another vocabulary: it has {what}")
    return [known[name] if name in known else next(free) for name in names]
