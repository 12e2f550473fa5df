"""Merge recorded runs of one model into a profile: how important every expert is to every language.

    fairseq-moe profile en-de.npz en-fr.npz --output profile.json

RECORD is what --moe-record wrote. An expert's importance is top1 * exp(confidence): the share of a language's tokens
whose first choice it is, and the mean of the gate's probability there (arXiv 2212.09811); an encoder's layers by source
language, a decoder's by target language. The table has, per layer and language, how many experts hold 90% of the
importance, and all of it. --expert-profile reads the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from fairseq_moe_ext.atomic_file import refuse_unwritable
from fairseq_moe_ext.buffering.profile import Profile, profile_of, save_profile
from fairseq_moe_ext.command_line.parsing import command_parser, failed
from fairseq_moe_ext.recording import load_record, merge_records

MOST_OF_IT = 0.9


def table(profile: Profile) -> str:
    """A row per layer and language."""
    rows = []
    for name, layer in profile.layers.items():
        for place, language in enumerate(profile.languages):
            if layer.tokens[place]:
                falling = np.sort(layer.importance[place])[::-1]
                most = 1 + int(np.searchsorted(np.cumsum(falling), MOST_OF_IT * falling.sum()))
                rows.append((name, language, layer.tokens[place], layer.num_experts, most, np.count_nonzero(falling)))
    return tabulate(rows, ("layer", "language", "tokens", "experts", "90% in", "all in"), tablefmt="plain")


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe profile` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("profile", __doc__)
    parser.add_argument("records", metavar="RECORD", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the profile (.json)")
    args = parser.parse_args(arguments)
    refuse_unwritable(parser, "--output", args.output)
    try:
        profile = profile_of(merge_records([load_record(path) for path in args.records]))
        save_profile(args.output, profile, "--output")
    except (ValueError, OSError) as error:
        return failed(error, 2)
    print(table(profile))
    return 0
