"""Whether dictionaries are a model's, by the number of words: what a multilingual task adds to them is counted, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fairseq.data import Dictionary

from fairseq_moe_ext.checkpoints.checkpoint_task import is_multilingual, languages_of
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.plain_config import namespace
from fairseq_moe_ext.nllb.tokens import extra_tokens_of


def check_sizes(
    path: str, rows: Collection[int], dictionaries: Mapping[str, Dictionary], fields: Mapping[str, Any]
) -> None:
    """CheckpointError unless each dictionary, by the name of its file, has as many words as embeddings have `rows`.

    path: the checkpoint; fields: of its task. Where a multilingual task's languages lie in a file elsewhere, a
    dictionary must have no more words than rows.
    """
    languages = languages_of(dict(fields))
    for name, words in dictionaries.items() if rows else ():
        found, added = len(words), 0
        if is_multilingual(dict(fields)):
            if languages is None:
                if found > max(rows):
                    raise _other(path, rows, name, f"{found}")
                continue
            token = "[{}]" if fields.get("lang_tok_style") == "mbart" else "__{}__"
            tokens = {token.format(language) for language in languages} | {*extra_tokens_of(namespace(dict(fields)))}
            added = sum(word not in words for word in tokens)
        if found + added not in rows:
            with_tokens = f"{found}, with the languages' tokens {found + added}" if added else f"{found}"
            raise _other(path, rows, name, with_tokens)


def _other(path: str, rows: Collection[int], name: str, got: str) -> CheckpointError:
    wanted = " or ".join(map(str, sorted(set(rows))))
    return CheckpointError(f"{path}: {name} must have as many words as its embeddings have rows, {wanted}, got {got}")
