"""What the tokenizer's files of a folder in Hugging Face's layout say: pieces, added tokens, language codes, and rows.

The pieces stand in `sentencepiece.bpe.model` or in tokenizer.json, as an object (BPE) or a list with scores (Unigram).
Added tokens stand, with their rows, in tokenizer.json, tokenizer_config.json or added_tokens.json. Which of them are
language codes the lists of special tokens say; where no file has such a list, their form among the special ones does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.nllb.hf_folder import read_json
from fairseq_moe_ext.nllb.tokens import MASK

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
SPM, FAST = "sentencepiece.bpe.model", "tokenizer.json"
SETTINGS, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOKENIZER_FILES = (SPM, FAST, SETTINGS, SPECIAL_MAP, "generation_config.json", ADDED)
LANGUAGE_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # eng_Latn
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class HfTokenizer:
    """pieces, added: token -> row; no token is in both, none is one of SPECIAL. languages: those of `added`."""

    pieces: dict[str, int]
    added: dict[str, int]
    languages: list[str]


def read_tokenizer(folder: Path) -> HfTokenizer:
    """CheckpointError, which names the file, where the rows of the tokens cannot be told for certain."""
    fast = _read(folder / FAST)
    pieces = _pieces(folder, fast)
    added, special, origin = _added_tokens(folder, fast)
    listed, lists = _listed(folder)
    if not added and listed:  # in the order of the list, as NLLB's tokenizer numbers them
        codes = [*dict.fromkeys(token for token in listed if token not in (MASK, *SPECIAL)), MASK]
        added = {code: len(SPECIAL) + len(pieces) + number for number, code in enumerate(codes)}
        special, origin = set(added), lists
    if not added:
        raise CheckpointError(
            f"{folder}: its language codes stand in none of {FAST}, {SETTINGS}, {SPECIAL_MAP}, {ADDED}"
        )
    marked = set(listed) if any(map(LANGUAGE_CODE.fullmatch, listed)) else special
    languages = sorted(filter(LANGUAGE_CODE.fullmatch, marked & added.keys()), key=added.get)
    if not languages:
        raise CheckpointError(
            f"{origin}: none of its {len(added)} added tokens is a special one like eng_Latn, a language"
        )
    for token, row in added.items():
        known = pieces.pop(token, SPECIAL.index(token) if token in SPECIAL else row)
        if known != row:
            raise CheckpointError(f"{origin}: {token} must stand in one row, found {known} and {row}")
    for row, token in enumerate(SPECIAL):
        if pieces.pop(token, row) != row:
            raise CheckpointError(f"{folder}: {token} must stand in row {row}")
        added.pop(token, None)
    _check_rows(folder, {**pieces, **added})
    return HfTokenizer(pieces, added, languages)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _pieces(folder: Path, fast: dict[str, Any]) -> dict[str, int]:
    spm = folder / SPM
    if (folder / "vocab.json").is_file():
        raise CheckpointError(f"{folder / 'vocab.json'}: a tokenizer other than NLLB's numbers the rows by it")
    if not spm.is_file():
        if not (folder / FAST).is_file():
            raise CheckpointError(f"{folder}: it must hold {SPM} or {FAST}, which name the embeddings' rows")
        return _vocab(folder / FAST, fast)
    pieces = {piece: len(SPECIAL) + number for number, piece in enumerate(_read_spm(spm))}
    added = _rows(folder / FAST, fast.get("added_tokens"))
    model = fast.get("model")
    theirs = _vocab(folder / FAST, fast) if isinstance(model, dict) and model.get("vocab") else {}
    for piece, row in theirs.items():
        if piece not in SPECIAL and piece not in added and pieces.get(piece) != row:
            raise CheckpointError(
                f"{folder / FAST}: {piece!r:.80} must stand in {SPM}'s row {pieces.get(piece)}, got {row}"
            )
    return pieces


def _vocab(file: Path, content: dict[str, Any]) -> dict[str, int]:
    """tokenizer.json's own pieces, its specials among them."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of the rows
        if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab):
            raise CheckpointError(f"{file}: model.vocab must hold pairs of a piece and its score")
        rows = {entry[0]: row for row, entry in enumerate(vocab)}
        if len(rows) != len(vocab):
            raise CheckpointError(f"{file}: model.vocab must hold every piece once, {len(vocab) - len(rows)} repeat")
    elif isinstance(vocab, dict) and all(type(row) is int and row >= 0 for row in vocab.values()):
        rows = dict(sorted(vocab.items(), key=lambda item: item[1]))
    else:
        what = "nothing" if vocab is None else f"{type(vocab).__name__}"
        raise CheckpointError(f"{file}: model.vocab must map pieces to rows or list them with scores, got {what}")
    if not rows:
        raise CheckpointError(f"{file}: its vocabulary, model.vocab, is empty")
    return rows


def _read_spm(file: Path) -> list[str]:
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model: {one_line(error)}") from error
    pieces = [model.id_to_piece(number) for number in range(len(model))]
    if pieces[:3] != ["<unk>", "<s>", "</s>"]:
        raise CheckpointError(f"{file}: its first pieces must be <unk>, <s> and </s>, got {pieces[:3]}")
    return pieces[3:]


def _added_tokens(folder: Path, fast: dict[str, Any]) -> tuple[dict[str, int], set[str], Path]:
    """Token -> row of what the tokenizer has beyond its pieces; which are special; the file that says so."""
    added: dict[str, int] = {}
    special: set[str] = set()
    origin = folder
    settings, plain = _read(folder / SETTINGS).get("added_tokens_decoder"), _read(folder / ADDED)
    decoder = settings if settings is None or isinstance(settings, dict) else {"": settings}
    for file, entries in (
        (folder / FAST, fast.get("added_tokens")),
        (folder / SETTINGS, None if decoder is None else [_with_row(row, entry) for row, entry in decoder.items()]),
        (folder / ADDED, [{"content": token, "id": row, "special": False} for token, row in plain.items()]),
    ):
        for token, (row, is_special) in _rows(file, entries).items():
            if added.setdefault(token, row) != row:
                raise CheckpointError(
                    f"{file}: {token!r:.80} must stand in one row, got {row}, in {origin.name} {added[token]}"
                )
            special |= {token} if is_special else set()
            origin = file
    return added, special, origin


def _with_row(row: str, entry: Any) -> Any:
    is_row = row.isdecimal() and len(row) < 10
    return {**entry, "id": int(row)} if isinstance(entry, dict) and is_row else entry


def _rows(file: Path, entries: Any) -> dict[str, tuple[int, bool]]:
    """Token -> (row, whether it is special); a file that does not say it has special ones."""
    rows = {}
    for entry in [] if entries is None else entries if isinstance(entries, list) else [entries]:
        token, row = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or type(row) is not int or row < 0:
            raise CheckpointError(f"{file}: every added token must have a text and a row, got {str(entry):.80}")
        rows[token] = (row, entry.get("special", True) is not False)
    return rows


def _listed(folder: Path) -> tuple[list[str], Path]:
    """The special tokens that the tokenizer's lists name, and the file that does."""
    for file in (folder / SPECIAL_MAP, folder / SETTINGS):
        content = _read(file)
        for name in _LISTS:
            tokens = content.get(name) or []
            if isinstance(tokens, dict):  # transformers 5 names some of them
                tokens = list(tokens.values())
            if not isinstance(tokens, list):
                raise CheckpointError(f"{file}: {name} must be a list, got {type(tokens).__name__}")
            found = [token.get("content") if isinstance(token, dict) else token for token in tokens]
            if not all(isinstance(token, str) for token in found):
                raise CheckpointError(f"{file}: {name} must hold tokens' texts, got {str(tokens):.80}")
            if found:
                return found, file
    return [], folder


def _check_rows(folder: Path, rows: dict[str, int]) -> None:
    """One row for each token, and a word that a dictionary's file can hold."""
    tokens: dict[int, str] = {}
    for token, row in rows.items():
        if row < len(SPECIAL) or tokens.setdefault(row, token) != token:
            other = SPECIAL[row] if row < len(SPECIAL) else tokens[row]
            names = f"{token!r:.80} and {other!r:.80}"
            raise CheckpointError(f"{folder}: the tokenizer's files give {names} one row, {row}")
        if not _fits_a_line(token):
            raise CheckpointError(f"{folder}: row {row}: a dictionary's file cannot hold the token {token!r:.80}")


def _fits_a_line(token: str) -> bool:
    try:
        return "\n" not in token and "\r" not in token and bool(token.encode("utf-8"))
    except UnicodeEncodeError:
        return False
