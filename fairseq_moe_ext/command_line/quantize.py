"""A checkpoint in one file of int8 or int4 experts, from any of fairseq's layouts or Hugging Face's.

    fairseq-moe quantize nllb-moe-54b --output nllb.safetensors --experts int4 --dense int8
    fairseq-moe quantize checkpoint_last.pt --output lm.safetensors --experts int8 --dense float16 --data data-bin

SOURCE is a model's folder in Hugging Face's layout, or a checkpoint as for --path. Its files are read one at a time:
one that is done may be deleted; where some are missing the command does the others and says which it waits for, and a
later run goes on. It prints what quantising changes in each matrix, ||W - W~|| / ||W||, of a layer's experts the mean.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_moe_ext.bounded_json import read_regular
from fairseq_moe_ext.checkpoints.dictionary_file import load_dictionary
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.fairseq_source import FairseqSource
from fairseq_moe_ext.checkpoints.quantization_source import Source
from fairseq_moe_ext.checkpoints.quantize_checkpoint import quantize_checkpoint
from fairseq_moe_ext.checkpoints.quantized_about import DENSE
from fairseq_moe_ext.checkpoints.quantized_file import SUFFIX, QuantizedFile
from fairseq_moe_ext.checkpoints.relative_error import error_table
from fairseq_moe_ext.command_line.parsing import command_parser, failed, keep_of
from fairseq_moe_ext.experts.formats import QUANTIZED
from fairseq_moe_ext.nllb.hf_source import HfSource
from fairseq_moe_ext.nllb.hf_tokenizer import SPM
from fairseq_moe_ext.nllb.vocabulary_size import check_sizes

_MOST_NAMES = 5  # of files that are waited for


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe quantize` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("quantize", __doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--output", required=True, metavar="TARGET", help=f"X{SUFFIX} to write")
    parser.add_argument("--experts", required=True, choices=tuple(QUANTIZED))
    parser.add_argument("--dense", required=True, choices=DENSE, help="linear layers and embeddings beside the experts")
    parser.add_argument(
        "--data", metavar="FOLDER", help="of fairseq's layouts: its dictionaries dict*.txt go into the file"
    )
    parser.add_argument(
        "--dictionary",
        metavar="FILE",
        help="the training's dict.txt; Hugging Face's layout: default: the order of the SentencePiece model; fairseq's "
        "layouts: instead of --data",
    )
    parser.add_argument(
        "--sentencepiece", metavar="FILE", help="the SentencePiece model; Hugging Face's layout: default: the folder's"
    )
    parser.add_argument(
        "--calibrate", metavar="RECORD", help="of --moe-record: experts are quantised by what their inputs were"
    )
    parser.add_argument(
        "--keep",
        metavar="FILE",
        help="experts by language (fairseq-moe prune): the file holds those of --pair alone, and the gates without the "
        "others",
    )
    parser.add_argument("--pair", metavar="SOURCE-TARGET", help="of --keep: its languages, as eng_Latn-fra_Latn")
    parser.add_argument(
        "--force", action="store_true", help="overwrite TARGET; begin anew where another source was begun"
    )
    args = parser.parse_args(arguments)
    is_folder = Path(args.source).is_dir()
    if args.data and (is_folder or args.dictionary):
        parser.error("--data goes with a checkpoint of fairseq's, and without --dictionary")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        _refuse_quantized(args.source)
        keep = keep_of(args.keep, args.pair)
        pieces = None if args.sentencepiece is None else _content(Path(args.sentencepiece))
        source: Source
        if is_folder:
            source = HfSource(args.source, args.dictionary, pieces)
        else:
            dictionaries = _dictionaries(args.data, args.dictionary)
            files = {name: _content(file) for name, file in dictionaries.items()}
            words = {name: load_dictionary(file) for name, file in dictionaries.items()}
            files |= {} if pieces is None else {SPM: pieces}
            source = FairseqSource(
                args.source, files, lambda rows, fields: check_sizes(args.source, rows, words, fields)
            )
        done = quantize_checkpoint(source, args.output, args.experts, args.dense, args.force, args.calibrate, keep)
    except (CheckpointError, OSError) as error:
        return failed(error)
    if done.missing:
        names = ", ".join(file.name for file in done.missing[:_MOST_NAMES])
        more = f" and {len(done.missing) - _MOST_NAMES} more" if len(done.missing) > _MOST_NAMES else ""
        return failed(f"{args.output} waits for {names}{more}: the rest is done, run the command again with them")
    print(error_table(done.errors), args.output, sep="\n\n")
    return 0


def _refuse_quantized(source: str) -> None:
    if Path(source).suffix == SUFFIX and Path(source).is_file():
        QuantizedFile(source)  # or says what it is
        raise CheckpointError(f"{source}: it is quantised already: quantise what it was made of")


def _dictionaries(data: str | None, dictionary: str | None) -> dict[str, Path]:
    """Name in the quantised file -> the file to read, of a checkpoint of fairseq's."""
    if data is not None:
        found = sorted(Path(data).glob("dict*.txt"))
        if not found:
            raise CheckpointError(f"--data {data}: it must be a folder with dict.txt or dict.<lang>.txt, found none")
        return {file.name: file for file in found}
    return {} if dictionary is None else {"dict.txt": Path(dictionary)}


def _content(file: Path) -> bytes:
    try:
        return read_regular(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
