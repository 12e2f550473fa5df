"""What `--moe-record`, `--expert-keep` and `--expert-profile` are told of a task: languages and end of sentence."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from fairseq_moe_ext.buffering.expert_profile import Languages
from fairseq_moe_ext.reporting.recorder import Recorder


def languages_of(task: Any) -> tuple[str, str]:
    """Source and target that a task serves now; "" and "" of a language model, or of several pairs at once."""
    return languages_of_flags(task.args if hasattr(task, "args") else task.cfg)


def languages_of_flags(flags: Any) -> tuple[str, str]:
    """The same by a task's arguments; before it is set up they may lack languages that lie in its data's names."""
    found = [_field(flags, name) or "" for name in ("source_lang", "target_lang")]
    pairs = _field(flags, "lang_pairs")
    if not all(found) and pairs:
        pairs = pairs.split(",") if isinstance(pairs, str) else list(pairs)
        found = list(pairs[0].partition("-")[::2]) if len(pairs) == 1 else ["", ""]
    return found[0], found[1]


def _field(flags: Any, name: str) -> Any:
    """None where there is none. omegaconf's error, which getattr with a default swallows, would keep its callers'
    frames, and with them a whole model, until garbage is collected."""
    has = name in flags.keys() if isinstance(flags, DictConfig) else hasattr(flags, name)  # noqa: SIM118
    return getattr(flags, name) if has else None


def languages_of_run(task: Any) -> Languages:
    """All that a task's run names; several pairs where it serves them all."""
    flags = task.args if hasattr(task, "args") else task.cfg
    source, target = languages_of(task)
    if source and target:
        return Languages((source,), (target,))
    if hasattr(task, "eval_lm_dataloader"):
        return Languages()
    pairs = _field(flags, "lang_pairs") or ()
    pairs = [pair.partition("-") for pair in (pairs.split(",") if isinstance(pairs, str) else pairs)]
    sources, targets = (tuple(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 2))
    return Languages(sources, targets)


def recorder_of(flags: Any, task: Any) -> Recorder | None:
    """What a task's `flags` ask for; None: no record. ValueError where its passes are not of one pair of languages."""
    if flags.moe_record is None:
        return None
    languages = languages_of(task)
    if not all(languages) and not hasattr(task, "eval_lm_dataloader"):
        raise ValueError(
            f"--moe-record {flags.moe_record} needs one pair of languages, got those of --lang-pairs: name one"
        )
    return Recorder(flags.moe_record, task.target_dictionary.eos(), languages)
