"""Choose the experts that a language, or a pair of languages, keeps, by a profile of recorded runs.

    fairseq-moe prune profile.json --output experts.json
    fairseq-moe prune profile.json --output experts.json --pair eng_Latn-fra_Latn --by threshold --guard-ends

PROFILE is what `fairseq-moe profile` wrote. The file that is written names experts by language: an encoder's are for
the source, a decoder's for the target. --expert-keep serves by it; `quantize --keep` and `convert --keep` write smaller
checkpoints. What it costs `fairseq-moe compare` tells. The table has what is kept of each side, which share of the
first choices that is, and of those at the ends of sentences.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from tabulate import tabulate

from fairseq_moe_ext.atomic_file import WriteError, write_json
from fairseq_moe_ext.buffering.profile import Profile, load_profile
from fairseq_moe_ext.buffering.pruning import (
    LEAST,
    METRICS,
    RATIO,
    fixed_counts,
    guarded_experts,
    keep_by_threshold,
    keep_fixed,
    scores_of,
)
from fairseq_moe_ext.command_line.parsing import command_parser, failed

SHARE = 0.2
Kept = dict[str, tuple[int, ...]]  # by layer


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe prune` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("prune", __doc__)
    parser.add_argument("profile", metavar="PROFILE")
    parser.add_argument("--output", required=True, metavar="FILE", help="experts.json to write")
    parser.add_argument(
        "--share", type=_share, default=SHARE, metavar="SHARE", help="of all experts; default: %(default)s"
    )
    parser.add_argument("--pair", metavar="SOURCE-TARGET", help="for this pair alone; default: each language by itself")
    parser.add_argument(
        "--by",
        choices=("fixed", "threshold"),
        default="fixed",
        help=f"as many of every layer of a side, or one threshold for all layers; at least {LEAST} of a layer in any "
        "case; default: %(default)s",
    )
    parser.add_argument(
        "--ratio",
        type=_ratio,
        metavar="N",
        help=f"of --by fixed: an encoder layer keeps N times as many as a decoder layer; default: {RATIO:g}",
    )
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0], help="default: %(default)s")
    parser.add_argument("--seed", type=int, metavar="N", help="of --metric random; default: 1")
    parser.add_argument(
        "--guard-ends",
        action="store_true",
        help="keep beside them in every decoder layer the experts that are the first choices where sentences end",
    )
    args = parser.parse_args(arguments)
    if args.ratio is not None and args.by != "fixed":
        parser.error(f"--ratio needs --by fixed, got {args.ratio:g} with --by {args.by}")
    if args.seed is not None and args.metric != "random":
        parser.error(f"--seed needs --metric random, got {args.seed} with --metric {args.metric}")
    try:
        profile = load_profile(args.profile)
        sides = _sides(profile, args.pair)
        if args.ratio is not None and len({_is_encoder(name) for name in profile.layers}) < 2:
            raise ValueError(f"--ratio needs a model with MoE layers on two sides, got {args.ratio:g} for one side")
        kept = _choose(profile, sides, args)
        numbered = {language: _numbers(profile, layers) for language, layers in kept.items()}
        write_json(args.output, numbered, "--output", indent=None)
    except (ValueError, WriteError) as error:
        return failed(error)
    print(_table(profile, kept), args.output, sep="\n\n")
    return 0


def _sides(profile: Profile, pair: str | None) -> list[dict[str, str]]:
    """What is chosen together, each as layer -> language; ValueError where the profile lacks a language."""
    known = {name: profile.languages_of(name) for name in profile.layers}
    if pair is None:
        found = [{name: each for name in known if each in known[name]} for each in profile.languages]
        return [each for each in found if each]
    languages = pair.split("-")
    if len(languages) != 2 or not all(languages):
        raise ValueError(f"--pair must be two languages such as eng_Latn-fra_Latn, got {pair!r}")
    chosen = {name: languages[not _is_encoder(name)] for name in known}
    for name, language in chosen.items():
        profile.of_languages(name, [language])
    return [chosen]


def _choose(profile: Profile, sides: Sequence[Mapping[str, str]], args: argparse.Namespace) -> dict[str, Kept]:
    """By language."""
    num_experts = {name: layer.num_experts for name, layer in profile.layers.items()}
    counts = fixed_counts(num_experts, args.share, RATIO if args.ratio is None else args.ratio)
    kept: dict[str, Kept] = {}
    if args.guard_ends and all(map(_is_encoder, profile.layers)):
        raise ValueError("--guard-ends needs a profile with MoE layers in a decoder, got one without")
    for layers in sides:
        scores, guarded = {}, {}
        for name, language in layers.items():
            scores |= scores_of(profile, language, [name], args.metric, 1 if args.seed is None else args.seed)
            if args.guard_ends and not _is_encoder(name):
                guarded[name] = guarded_experts(_of(profile, name, "ends", language))
                if not guarded[name]:
                    raise ValueError(
                        f"--guard-ends needs a profile with ends of sentences of {language!r} in {name}, it has none"
                    )
        if args.by == "fixed":
            found = keep_fixed(scores, counts, guarded)
        else:
            found = keep_by_threshold(scores, round(args.share * sum(num_experts[name] for name in layers)), guarded)
        for name, numbers in found.items():
            kept.setdefault(layers[name], {})[name] = numbers
    return kept


def _numbers(profile: Profile, kept: Kept) -> list[int]:
    """In the published form: counted through all layers, an encoder's first."""
    numbers, start = [], 0
    for name in sorted(profile.layers, key=lambda name: not _is_encoder(name)):
        numbers += [start + expert for expert in kept.get(name, ())]
        start += profile.layers[name].num_experts
    return numbers


def _table(profile: Profile, kept: Mapping[str, Kept]) -> str:
    rows = []
    for language, layers in kept.items():
        row = [language]
        for side in (True, False):
            names = [name for name in layers if _is_encoder(name) == side]
            of_all = sum(profile.layers[name].num_experts for name in names)
            row += [
                f"{sum(len(layers[name]) for name in names)} of {of_all}" if names else "",
                _covered(profile, layers, names, "activity", language),
            ]
        rows.append((*row, _covered(profile, layers, names, "ends", language)))
    head = ("language", "encoder", "first choices", "decoder", "first choices", "of those at ends")
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _covered(profile: Profile, kept: Kept, names: Sequence[str], field: str, language: str) -> str:
    """Which share of a field's sum is the kept experts', in the layers together."""
    values = [_of(profile, name, field, language) for name in names]
    total = sum(float(each.sum()) for each in values)
    ours = sum(float(each[list(kept[name])].sum()) for name, each in zip(names, values, strict=True))
    return f"{ours / total:.1%}" if total else ""


def _of(profile: Profile, name: str, field: str, language: str) -> np.ndarray:
    return getattr(profile.layers[name], field)[profile.languages.index(language)]


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.")


def _share(text: str) -> float:
    return _number(text, "a share above 0 and at most 1", lambda share: 0 < share <= 1)


def _ratio(text: str) -> float:
    return _number(text, "a number above 0", lambda ratio: 0 < ratio < 1e6)


def _number(text: str, rule: str, fits) -> float:
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not fits(found):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return found
