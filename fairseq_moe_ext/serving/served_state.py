"""A checkpoint's files -> the state that fairseq's loading functions expect, checked and completed for serving."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.checkpoint_task import SERVED, CheckpointTask
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.kept_layers import SIDES, prune_as_configured
from fairseq_moe_ext.checkpoints.loading import ModelState
from fairseq_moe_ext.checkpoints.plain_config import ConfigError, namespace
from fairseq_moe_ext.checkpoints.rank_files import updates
from fairseq_moe_ext.checkpoints.served_config import criterion_fields, served_config, task_fields
from fairseq_moe_ext.checkpoints.state_keys import expert_count, layer_numbers, layers_of_hidden_dim, moe_layer_numbers
from fairseq_moe_ext.nllb.tokens import TAGS_FIELD, extra_tokens_of, vocabulary_advice


def _layers(model: Mapping[str, Any]) -> list[list[int]]:
    return [layer_numbers(model, side) for side in ("encoder", "decoder")]


def served_state(path: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state of the checkpoint at `path` under `overrides` (`--model-overrides`), as fairseq's loader gives it.

    Its tensors are read where they are used. CheckpointError where the file or its configuration is wrong.
    """
    state = read_checkpoint(path)
    if state.get("cfg") is None and state.get("args") is None:
        raise CheckpointError(f"{path}: not a fairseq checkpoint: it holds neither 'cfg' nor 'args'")
    try:
        cfg = served_config(state, overrides or {})
        before = _layers(state["model"])
        prune_as_configured(cfg.model, state["model"])
        if state["model"].kept is not None and _layers(state["model"]) != before:
            raise CheckpointError(
                "it holds a pair's experts alone, by the layers that it has: --encoder-layers-to-keep and "
                "--decoder-layers-to-keep must be left out"
            )
        _tell_layers(cfg.model, state["model"])
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    task = task_fields(state, overrides)
    told = extra_tokens_of(namespace(task)) if TAGS_FIELD in task else None
    state["model"].advise = partial(vocabulary_advice, told)
    vars(cfg.model)["served_state"] = state["model"]  # for the task, which builds the model before it is loaded
    history = [{"num_updates": updates(state) or 0}]
    found = {"cfg": cfg, "args": None, "model": state["model"], "optimizer_history": history}
    found["criterion"] = criterion_fields(state, overrides)
    return {**found, "task_state": {SERVED: CheckpointTask.of_state(path, state, task)}}


def _tell_layers(model_cfg: Namespace, model: ModelState) -> None:
    """Write into the model's arguments what its state says: which layers have experts, and how many.

    Upstream's two branches read `moe_freq`, `encoder_moe_freq` and `decoder_moe_freq` differently, and layers that were
    kept of a larger model stand wherever they came to stand; the keys do not lie.
    """
    model_cfg.layers_of_experts = None
    num_experts = expert_count(model) if model.kept is None else max(model.kept.counts.values())
    whole = num_experts if model.kept is None else model.kept.num_experts  # as a quantised one's configuration says
    given = getattr(model_cfg, "moe_expert_count", None)
    if num_experts > 0:
        if given not in (None, 0, num_experts, whole):
            raise CheckpointError(
                f"moe_expert_count must be what the checkpoint's gates score, {num_experts}, got {given}"
            )
        model_cfg.moe_expert_count = num_experts
    numbers = {side: moe_layer_numbers(model, side) or _alternate_layers(model_cfg, model, side) for side in SIDES}
    if num_experts > 0 or any(numbers.values()):
        model_cfg.layers_of_experts = numbers


def _alternate_layers(model_cfg: Namespace, model: dict[str, torch.Tensor], side: str) -> list[int]:
    """Of a side without experts: which dense layers of another size stand in the MoE layers' place."""
    name = "alternate_ffn_embed_dim" if side == "encoder" else "alternate_decoder_ffn_embed_dim"
    hidden_dim = getattr(model_cfg, name, None)
    return layers_of_hidden_dim(model, side, hidden_dim) if hidden_dim else []
