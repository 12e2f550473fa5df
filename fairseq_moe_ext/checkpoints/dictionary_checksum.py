"""One word for a whole dictionary: which token stands in which row of the embeddings.

A converted checkpoint keeps it in `extra_state[DICTIONARY_CHECKSUM]`, of the dictionary as fairseq's task has it in the
end: specials, dict.txt's words, language tokens, extra tokens. Whoever serves the checkpoint compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

DICTIONARY_CHECKSUM = "dictionary_checksum"


def dictionary_checksum(symbols: Iterable[str]) -> str:
    """SHA-256, in hex, of the tokens in the order of their rows (`Dictionary.symbols`).

    >>> dictionary_checksum(["a", "b"]) == dictionary_checksum(["b", "a"])
    False
    """
    return hashlib.sha256(json.dumps(list(symbols)).encode()).hexdigest()
