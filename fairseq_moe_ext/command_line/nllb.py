"""NLLB-200 from Hugging Face's layout to one checkpoint for fairseq, or the way back.

    fairseq-moe nllb nllb-moe-54b --output nllb.pt --dictionary dict.txt --dtype float16
    fairseq-moe nllb nllb.pt --to-hf --output nllb-hf --dictionary dict.txt --tokenizer nllb-moe-54b

The first holds no more than one shard in memory, goes on where it was broken off, and writes X.dict.txt and X.langs.txt
beside X.pt: the dictionary and the languages for fairseq's commands.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.command_line.parsing import command_parser, failed
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.export import export_hf

DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe nllb` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("nllb", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="the model's folder; with --to-hf a checkpoint as for --path")
    parser.add_argument("--output", required=True, metavar="TARGET", help="X.pt to write; with --to-hf a new folder")
    parser.add_argument(
        "--dictionary", metavar="FILE", help="the training's dict.txt; default: the order of the SentencePiece model"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; default: as they are")
    parser.add_argument("--force", action="store_true", help="overwrite TARGET")
    parser.add_argument("--to-hf", action="store_true", help="from fairseq to Hugging Face's layout")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="--to-hf: tokenizer files to copy, which name the rows")
    args = parser.parse_args(arguments)
    if args.tokenizer and not args.to_hf or args.force and args.to_hf:
        parser.error("--tokenizer goes with --to-hf, --force without it")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        if args.to_hf:
            files, flags = export_hf(args.source, args.output, args.dictionary, args.tokenizer, dtype), None
        else:
            done = convert_nllb(args.source, args.output, args.dictionary, dtype, args.force)
            files, flags = done.files, done.task_flags
    except (CheckpointError, OSError) as error:
        return failed(error)
    print(*files, sep="\n")
    if flags is not None:
        task = "--task moe_translation_multi_simple_epoch"
        print(f"serve it with: {task} --fixed-dictionary {files[1]} --lang-dict {files[2]} {flags}", file=sys.stderr)
    return 0
