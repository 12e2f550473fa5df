"""The options of a validation that translates (`--eval-bleu`), which fairseq reads when the model is built."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from fairseq.dataclass.configs import GenerationConfig
from fairseq.registry import REGISTRIES


def check_eval_bleu(task_cfg: Any) -> None:
    """ValueError naming the option, the rule and the value; `task_cfg` is the configuration of a translation task."""
    if not task_cfg.eval_bleu:
        return
    known = {item.name for item in fields(GenerationConfig)}
    unknown = sorted(_mapping("--eval-bleu-args", task_cfg.eval_bleu_args).keys() - known)
    if unknown:
        raise ValueError(f"--eval-bleu-args must name options of generation, got {', '.join(unknown)}")
    _mapping("--eval-bleu-detok-args", task_cfg.eval_bleu_detok_args)
    tokenizers = REGISTRIES["tokenizer"]["registry"]
    if task_cfg.eval_bleu_detok not in tokenizers:
        names = ", ".join(sorted(tokenizers))
        raise ValueError(f"--eval-bleu-detok must be one of {names}, got {task_cfg.eval_bleu_detok}")


def _mapping(flag: str, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{flag} must be a mapping in JSON, as '{{\"beam\": 4}}', got {text}")
    return found
