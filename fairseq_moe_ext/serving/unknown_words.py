"""Lines that the model does not know the words of: mostly raw text where it wants the pieces of its own BPE."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fairseq.data import Dictionary
from torch import Tensor

logger = logging.getLogger("fairseq_moe_ext")

MOST_SHOWN = 80  # characters of a line


def warn_of_unknown_words(lines: Sequence[str], tokens: Sequence[Tensor], dictionary: Dictionary) -> None:
    """One warning where more than half of a line's words are unknown; tokens: of each line, (L,), its end included."""
    unknown = [int(row.eq(dictionary.unk()).sum()) for row in tokens]
    words = [int(row.ne(dictionary.eos()).sum()) for row in tokens]
    strange = [number for number in range(len(tokens)) if 2 * unknown[number] > words[number]]
    if not strange:
        return
    first = strange[0]
    line = lines[first] if len(lines[first]) <= MOST_SHOWN else f"{lines[first][:MOST_SHOWN]}..."
    logger.warning(
        "%d of the %d words of %r are unknown to the model, which reads <unk> for each (such lines: %d of %d): --bpe "
        "and --tokenizer must be those of its training data, with the model's files",
        *(unknown[first], words[first], line, len(strange), len(tokens)),
    )
