"""Merge a checkpoint's files into one, split it into rank files, or print what it is.

    fairseq-moe convert summary checkpoint_last.pt
    fairseq-moe convert merge   checkpoint_last.pt merged.pt --drop-optimizer
    fairseq-moe convert split   merged.pt parts.pt --ranks 8

SOURCE is any layout that the plugin serves, named as for --path.
"""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize
from fairseq_moe_ext.checkpoints.convert import merge, split
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.command_line.parsing import command_parser, failed, keep_of


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe convert` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("convert", __doc__)
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
            job.add_argument(
                "--keep",
                metavar="FILE",
                help="experts by language (fairseq-moe prune): write those of --pair alone, as many of each layer",
            )
            job.add_argument("--pair", metavar="SOURCE-TARGET", help="of --keep: its languages, as eng_Latn-fra_Latn")
    jobs.choices["split"].add_argument("--ranks", type=int, required=True, help="number of rank files")
    args = parser.parse_args(arguments)
    try:
        if args.job == "summary":
            print(summarize(args.source))
            return 0
        ranks = {"ranks": args.ranks} if args.job == "split" else {}
        convert = split if args.job == "split" else merge
        given = {"drop_optimizer": args.drop_optimizer, "force": args.force, "keep": keep_of(args.keep, args.pair)}
        written = convert(args.source, args.target, **given, **ranks)
    except (CheckpointError, OSError) as error:
        return failed(error)
    print(*written, sep="\n")
    return 0
