"""The replacements inside fairseq: its two functions that find and read checkpoint files, and scoring under ranks.

They are installed by a task's `setup_task`, once, never at import.
"""

from __future__ import annotations

import functools
import logging
import os
from argparse import Namespace
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.sequence_scorer import SequenceScorer

from fairseq_moe_ext.serving.checkpoint import read_checkpoint
from fairseq_moe_ext.serving.checkpoint_task import SERVED, CheckpointTask
from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.find_files import find_checkpoint_files
from fairseq_moe_ext.serving.generator import count_results, take_turn
from fairseq_moe_ext.serving.nllb_tokens import TAGS_FIELD, extra_tokens_of
from fairseq_moe_ext.serving.plain_config import ConfigError, namespace
from fairseq_moe_ext.serving.rank_files import updates
from fairseq_moe_ext.serving.safe_loader import SAFE_GLOBALS, revive
from fairseq_moe_ext.serving.served_config import served_config, task_fields
from fairseq_moe_ext.serving.state_keys import expert_count, moe_layer_numbers

logger = logging.getLogger("fairseq_moe_ext")


class ServedPath(str):
    """A checkpoint path that is being loaded for serving, not for training to go on."""


def install() -> None:
    """Replace fairseq's checkpoint functions by ours; a second call changes nothing."""
    if hasattr(checkpoint_utils.load_checkpoint_to_cpu, "moe_ext_original"):
        return
    checkpoint_utils.load_checkpoint_to_cpu = _replacing(checkpoint_utils.load_checkpoint_to_cpu, _load)
    checkpoint_utils.get_maybe_sharded_checkpoint_filename = _replacing(
        checkpoint_utils.get_maybe_sharded_checkpoint_filename, _find
    )
    SequenceScorer.generate = _replacing(SequenceScorer.generate, _score)


def _replacing(original, replacement):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return replacement(original, *args, **kwargs)

    wrapper.moe_ext_original = original
    return wrapper


def _score(original, scorer, models, sample, **kwargs):
    """fairseq-eval-lm makes its scorer by itself."""
    hypotheses = take_turn(sample, lambda: original(scorer, models, sample, **kwargs))
    count_results(sample, hypotheses)
    return hypotheses


def _find(_original, filename: str, suffix: str, shard_idx: int, num_shards: int) -> str:
    """fairseq asks which file to load when it serves (never when training goes on)."""
    if os.pathsep in filename and not os.path.exists(filename):  # fairseq-generate has taken an ensemble apart
        raise CheckpointError(f"--path must name one checkpoint to this command, got {filename}")
    filename = filename.replace(".pt", suffix + ".pt")  # as fairseq reads --checkpoint-suffix
    if num_shards > 1:  # fairseq's own way past every check: it then loads with strict=False
        raise CheckpointError(
            f"--checkpoint-shard-count must be 1: the files of {filename} are found without it, got {num_shards}"
        )
    return ServedPath(find_checkpoint_files(filename).first)


def _load(original, path: str, arg_overrides: dict | None = None, load_on_all_ranks: bool = False) -> dict[str, Any]:
    if not isinstance(path, ServedPath):
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return revive(original(path, arg_overrides, load_on_all_ranks), lambda tensor: tensor)
    state = read_checkpoint(path)
    if state.get("cfg") is None and state.get("args") is None:
        raise CheckpointError(f"{path}: not a fairseq checkpoint: it holds neither 'cfg' nor 'args'")
    try:
        cfg = served_config(state, arg_overrides or {})
        _tell_layers(cfg.model, state["model"])
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    task = task_fields(state, arg_overrides)
    if TAGS_FIELD in task:
        state["model"].extra_tokens = extra_tokens_of(namespace(task))
    vars(cfg.model)["served_state"] = state["model"]  # for the task, which builds the model before it is loaded
    history = [{"num_updates": updates(state) or 0}]
    found = {"cfg": cfg, "args": None, "model": state["model"], "optimizer_history": history}
    return {**found, "task_state": {SERVED: CheckpointTask.of_state(path, state, task)}}


def _tell_layers(model_cfg: Namespace, model: dict[str, torch.Tensor]) -> None:
    """Write into the model's arguments what its state says: which layers have experts, and how many.

    Upstream's two branches read `moe_freq`, `encoder_moe_freq` and `decoder_moe_freq` differently; the keys do not lie.
    """
    num_experts = expert_count(model)
    if num_experts == 0:
        return
    given = getattr(model_cfg, "moe_expert_count", None)
    if given not in (None, 0, num_experts):
        raise CheckpointError(f"moe_expert_count must be what the checkpoint's gates score, {num_experts}, got {given}")
    model_cfg.moe_expert_count = num_experts
    given_freqs = {side: _given_freq(model_cfg, side) for side in ("encoder", "decoder")}
    model_cfg.moe_freq = 0
    for side, given_freq in given_freqs.items():
        numbers = moe_layer_numbers(model, side)
        freq = numbers[0] + 1 if numbers else given_freq
        if numbers != list(range(freq - 1, numbers[-1] + 1, freq) if numbers else []):
            raise CheckpointError(f"the {side}'s MoE layers must stand at every n-th layer, found them at {numbers}")
        setattr(model_cfg, f"{side}_moe_freq", freq)


def _given_freq(model_cfg: Namespace, side: str) -> int:
    """Of a side without experts: 0, but where dense layers of another size stand in the MoE layers' place."""
    alternate = "alternate_ffn_embed_dim" if side == "encoder" else "alternate_decoder_ffn_embed_dim"
    if not getattr(model_cfg, alternate, None):
        return 0
    return max(int(getattr(model_cfg, name, None) or 0) for name in (f"{side}_moe_freq", "moe_freq"))

