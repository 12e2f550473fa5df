"""The flag of pruning: which experts of a model are served at all."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass

from fairseq_moe_ext.buffering.profile import Profile, load_profile
from fairseq_moe_ext.buffering.pruning import fixed_counts, keep_fixed, scores_of
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts, check_sets, is_of_encoder, read_kept
from fairseq_moe_ext.checkpoints.loading import ModelState
from fairseq_moe_ext.checkpoints.state_keys import experts_by_layer
from fairseq_moe_ext.serving.recorded_languages import languages_of, languages_of_flags
from fairseq_moe_ext.tasks.flag import check_values, flag, values_of

_NUMBER = re.compile(r"[0-9.eE+-]+")


def _keep(text: Any) -> float | Path:
    """A share, or a file."""
    if not _NUMBER.fullmatch(str(text)):
        return Path(str(text))
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(
            f"must be a file of experts by language (.json), or a share above 0 and at most 1, got {text!r}"
        )
    return share


@dataclass
class KeepFlags(FairseqDataclass):
    """Which experts are served."""

    expert_keep: Optional[str] = flag(
        None,
        "serve these experts alone, and the gates without the others: a file of experts by language (fairseq-moe "
        "prune), of which the source's encoder and the target's decoder experts are kept, or a share as 0.2, of the "
        "most important ones by --expert-profile; default: all",
        read=_keep,
    )


def keeps_share(flags: Any) -> bool:
    """Whether `--expert-profile` says which experts are kept."""
    return isinstance(values_of(KeepFlags, flags)["expert_keep"], float)


def check_keep_flags(flags: Any) -> None:
    """Raise ValueError naming flag, rule and value; `flags` is a task's arguments."""
    check_values(KeepFlags, flags)
    keep = values_of(KeepFlags, flags)["expert_keep"]
    if keep is None:
        return
    if str(getattr(flags, "moe_gating", "dynamic")) == "static":
        raise ValueError(
            f"--expert-keep needs --moe-gating dynamic, got {keep} with static gating, whose capacity depends on how "
            "many experts there are"
        )
    languages = languages_of_flags(flags)
    if isinstance(keep, Path):
        check_sets("--expert-keep", keep, filter(None, languages))
    else:
        _profile_of_share(flags, keep, languages)


def kept_experts(task: Any, flags: Any, state: ModelState | None) -> KeptExperts | None:
    """Which experts of a checkpoint are served; None: all.

    task: that serves it; state: the checkpoint's. ValueError naming flag, rule and value.
    """
    keep = values_of(KeepFlags, flags)["expert_keep"]
    own = None if state is None else state.kept
    if state is None or keep is None and own is None:
        return None
    path, languages = state.loading.path, languages_of(task)
    if own is not None:
        if keep is not None:
            raise ValueError(
                f"--expert-keep must be left out: {path} holds a pair's experts alone, got {keep}"
            )
        if str(getattr(flags, "moe_gating", "dynamic")) == "static":
            raise ValueError(f"--moe-gating must be dynamic with the experts of a pair alone, got static with {path}")
        own.check_languages(*languages, f"for which {path} holds the experts")
        return own
    if not all(languages) and not hasattr(task, "eval_lm_dataloader"):
        raise ValueError(
            f"--expert-keep {keep} needs one pair of languages, whose experts are kept, got those of --lang-pairs: "
            "name one"
        )
    num_experts = experts_by_layer(state)
    if isinstance(keep, Path):
        return read_kept("--expert-keep", keep, languages, num_experts)
    return _kept_by_share(keep, _profile_of_share(flags, keep, languages), flags, languages, num_experts)


def _profile_of_share(flags: Any, share: float, languages: tuple[str, str]) -> Profile:
    path = getattr(flags, "expert_profile", None)
    if path is None:
        raise ValueError(
            f"--expert-keep {share} needs --expert-profile, by which experts are kept, got none (or a file of experts "
            "in place of the share)"
        )
    try:
        profile = load_profile(path)
    except ValueError as error:
        raise ValueError(f"--expert-keep {share} needs a profile that fairseq-moe profile wrote: {error}") from error
    for name in profile.layers:
        language = languages[not is_of_encoder(name)]
        if language or not any(languages) and profile.languages == ("",):
            try:
                profile.of_languages(name, [language])
            except ValueError as error:
                raise ValueError(f"--expert-profile {path}: {error}") from error
    return profile


def _kept_by_share(
    share: float, profile: Profile, flags: Any, languages: tuple[str, str], num_experts: dict[str, int]
) -> KeptExperts:
    found = {name: layer.num_experts for name, layer in profile.layers.items()}
    if found != num_experts:
        raise ValueError(
            f"--expert-profile {flags.expert_profile}: it must be of the checkpoint's {len(num_experts)} MoE layers of "
            f"{max(num_experts.values(), default=0)} experts, got {len(found)} of {max(found.values())}"
        )
    scores = {}
    for side, language in zip((True, False), languages, strict=True):
        layers = [name for name in num_experts if is_of_encoder(name) == side]
        scores |= scores_of(profile, language, layers, "importance") if layers else {}
    kept = keep_fixed(scores, fixed_counts(num_experts, share))
    return KeptExperts(languages, max(num_experts.values()), {name: kept[name] for name in num_experts})
