"""What a quantised checkpoint's file has beside its weights: dictionaries, languages, the SentencePiece model.

fairseq reads them from a folder, which is made for the time that the model is served.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from fairseq_moe_ext.atomic_file import write_bytes
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile

LANGUAGES, SENTENCEPIECE, DICTIONARY = "langs.txt", "sentencepiece.bpe.model", "dict.txt"
_NAME = re.compile(rf"{re.escape(LANGUAGES)}|{re.escape(SENTENCEPIECE)}|dict\.([\w@+-]{{1,100}}\.)?txt")
TEXT_OPTIONS = ("tokenizer", "bpe", "post_process", "remove_bpe")  # any of which says how a text is cut


class FileData:
    """The folder, which is removed by `close`, with this object, or when the process ends.

    CheckpointError where the file is damaged, has no dictionary, or a file of another name.
    """

    def __init__(self, path: str):
        self._path = path
        files = QuantizedFile(path).files()
        for name in files:
            if not _NAME.fullmatch(name):
                raise CheckpointError(f"{path}: a quantised checkpoint has no file of such a name, got {name!r:.80}")
        if not any(name.startswith("dict.") for name in files):
            raise CheckpointError(f"{path}: it has no dictionary in it: data must name the folder with the model's")
        self._names = frozenset(files)
        self.folder = Path(tempfile.mkdtemp(prefix="fairseq_moe_ext."))
        self._remove = weakref.finalize(self, _remove, self.folder, os.getpid())
        for name, content in files.items():
            write_bytes(self.folder / name, content)

    def options(self, multilingual: bool, names_languages: bool) -> dict[str, Any]:
        """By keyword, those of the task that name these files. names_languages: whether the checkpoint's task does."""
        found: dict[str, Any] = {}
        if multilingual and DICTIONARY in self._names:
            found["fixed_dictionary"] = str(self.folder / DICTIONARY)
        if multilingual and LANGUAGES in self._names and not names_languages:
            found["lang_dict"] = str(self.folder / LANGUAGES)
        return found

    def text_options(self) -> dict[str, Any]:
        """By keyword, what makes pieces of a text and back; none where there is no SentencePiece model."""
        if SENTENCEPIECE not in self._names:
            return {}
        return {"bpe": "sentencepiece", "sentencepiece_model": str(self.folder / SENTENCEPIECE)}

    def close(self) -> None:
        """Remove the folder; once more does nothing."""
        self._remove()


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child's folder is its parent's
        shutil.rmtree(folder, ignore_errors=True)
