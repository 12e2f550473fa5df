"""Merge a checkpoint's files into one, split it into rank files, or print what it is.

    python scripts/convert_checkpoint.py summary checkpoint_last.pt
    python scripts/convert_checkpoint.py merge   checkpoint_last.pt merged.pt --drop-optimizer
    python scripts/convert_checkpoint.py split   merged.pt parts.pt --ranks 8

SOURCE is any layout that the plugin serves, named as for --path. What is written: fairseq_moe_ext/serving/convert.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_moe_ext.serving.checkpoint_summary import summarize  # noqa: E402
from fairseq_moe_ext.serving.convert import merge, split  # noqa: E402
from fairseq_moe_ext.serving.errors import CheckpointError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("summary", help="layers, experts, dims, bytes, dtype, vocabulary; reads no weights")
    jobs.add_parser("merge", help="write one file")
    jobs.add_parser("split", help="write X-shared.pt and X-rank-0.pt ... for TARGET X.pt")
    for name, job in jobs.choices.items():
        job.add_argument("source", metavar="SOURCE")
        if name != "summary":
            job.add_argument("target", metavar="TARGET")
            job.add_argument("--drop-optimizer", action="store_true", help="leave the optimizer's state out")
            job.add_argument("--force", action="store_true", help="overwrite files")
    jobs.choices["split"].add_argument("--ranks", type=int, required=True, help="number of rank files")
    args = parser.parse_args(arguments)
    try:
        if args.job == "summary":
            print(summarize(args.source))
            return 0
        ranks = {"ranks": args.ranks} if args.job == "split" else {}
        convert = split if args.job == "split" else merge
        written = convert(args.source, args.target, drop_optimizer=args.drop_optimizer, force=args.force, **ranks)
    except (CheckpointError, OSError) as error:
        print(f"error: {str(error).removeprefix('--path ')}", file=sys.stderr)
        return 1
    for file in written:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
