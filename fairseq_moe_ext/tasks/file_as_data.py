"""A quantised checkpoint in the place of a command's data folder: its own dictionaries, languages and pieces."""

from __future__ import annotations

import atexit
import os
from argparse import Namespace
from collections.abc import Collection

from fairseq.utils import FileContentsAction

from fairseq_moe_ext.checkpoints.quantized_state import is_quantized
from fairseq_moe_ext.serving.file_data import FileData
from fairseq_moe_ext.serving.keyword_options import KeywordOptions
from fairseq_moe_ext.serving.load_models import options_of_checkpoint, options_of_file
from fairseq_moe_ext.serving.served_state import served_state
from fairseq_moe_ext.tasks.refused_options import INTERACTIVE


class CheckpointOrContents(FileContentsAction):
    """As fairseq's, an argument that is a file stands for its contents; a quantised checkpoint for itself."""

    def __call__(self, parser, namespace, values, option_string=None):
        """As argparse calls it."""
        if isinstance(values, str) and is_quantized(values):
            setattr(namespace, self.dest, values)
        else:
            super().__call__(parser, namespace, values, option_string)


def take_data_from_file(command: str, args: Namespace, written: Collection[str]) -> None:
    """Where the data are a quantised checkpoint: let `args` name a folder with what lies in it, and say its task.

    command: one of SERVING. written: the options that the user wrote, which stand above the file's. ValueError in a
    command that reads a data set, of which the file has none; CheckpointError where the file is damaged.
    """
    data = getattr(args, "data", None)
    if not isinstance(data, str) or not is_quantized(data):
        return
    if command != INTERACTIVE:
        raise ValueError(
            f"data must be a folder with a data set in fairseq-{command.replace('_', '-')}, got the checkpoint {data}, "
            "which is enough for fairseq-interactive"
        )
    if not os.path.isfile(data):
        raise ValueError(f"data {data}: no such file")
    state, own = served_state(data), FileData(data)
    atexit.register(own.close)
    named = {name: getattr(args, name) for name in written}
    options = {**options_of_checkpoint(state), **named}
    options = {**options_of_file(own, state, options), **options}
    found = KeywordOptions(args.task).parse(str(own.folder), {n: v for n, v in options.items() if n not in named}, True)
    for name in options.keys() - named.keys():
        setattr(args, name, getattr(found, name))
    args.data = str(own.folder)
    if hasattr(args, "lang_pairs") and args.lang_pairs is None:
        args.lang_pairs = f"{args.source_lang}-{args.target_lang}"
