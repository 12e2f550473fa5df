"""A checkpoint's files -> the state that fairseq's loading functions expect, checked and completed for serving."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from fairseq_moe_ext.serving.checkpoint import read_checkpoint
from fairseq_moe_ext.serving.checkpoint_task import SERVED, CheckpointTask
from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.nllb_tokens import TAGS_FIELD, extra_tokens_of
from fairseq_moe_ext.serving.plain_config import ConfigError, namespace
from fairseq_moe_ext.serving.rank_files import updates
from fairseq_moe_ext.serving.served_config import criterion_fields, served_config, task_fields
from fairseq_moe_ext.serving.state_keys import expert_count, moe_layer_numbers


def served_state(path: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state of the checkpoint at `path` under `overrides` (`--model-overrides`), as fairseq's loader gives it.

    Its tensors are read where they are used. CheckpointError where the file or its configuration is wrong.
    """
    state = read_checkpoint(path)
    if state.get("cfg") is None and state.get("args") is None:
        raise CheckpointError(f"{path}: not a fairseq checkpoint: it holds neither 'cfg' nor 'args'")
    try:
        cfg = served_config(state, overrides or {})
        _tell_layers(cfg.model, state["model"])
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    task = task_fields(state, overrides)
    if TAGS_FIELD in task:
        state["model"].extra_tokens = extra_tokens_of(namespace(task))
    vars(cfg.model)["served_state"] = state["model"]  # for the task, which builds the model before it is loaded
    history = [{"num_updates": updates(state) or 0}]
    found = {"cfg": cfg, "args": None, "model": state["model"], "optimizer_history": history}
    found["criterion"] = criterion_fields(state)
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
