"""NLLB-200 from Hugging Face's layout to one checkpoint for fairseq, or the way back.

    python scripts/convert_nllb_moe.py nllb-moe-54b --output nllb.pt --dictionary dict.txt --dtype float16
    python scripts/convert_nllb_moe.py nllb.pt --to-hf --output nllb-hf --dictionary dict.txt --tokenizer nllb-moe-54b

The first holds no more than one shard in memory, goes on where it was broken off, and writes X.dict.txt and X.langs.txt
beside X.pt: the dictionary and the languages for fairseq's commands. What is written: serving/convert_nllb.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_moe_ext.serving.convert_nllb import convert_nllb  # noqa: E402
from fairseq_moe_ext.serving.errors import CheckpointError  # noqa: E402
from fairseq_moe_ext.serving.export_hf import export_hf  # noqa: E402

DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        print(f"error: {str(error).removeprefix('--path ')}", file=sys.stderr)
        return 1
    for file in files:
        print(file)
    if flags is not None:
        task = "--task moe_translation_multi_simple_epoch"
        print(f"serve it with: {task} --fixed-dictionary {files[1]} --lang-dict {files[2]} {flags}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
