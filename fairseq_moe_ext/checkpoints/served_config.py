"""The configuration that fairseq gets to see of a served checkpoint: the model's and, of a language model, the task's.

Everything else in the file, and every path and resolver in it, stays where it is.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import DictConfig, OmegaConf

from fairseq_moe_ext.checkpoints.config_fields import parse_fields, parse_model_fields
from fairseq_moe_ext.checkpoints.kept_layers import settle_kept_layers
from fairseq_moe_ext.checkpoints.plain_config import ConfigError, namespace, plain, shown
from fairseq_moe_ext.checkpoints.state_keys import expert_counts, layer_count

_LM_TASKS = ("language_modeling", "moe_language_modeling")
# what of a language model's task bears on the model beside a served one (--lm-path)
_LM_FIELDS = (
    *("sample_break_mode", "tokens_per_sample", "output_dictionary_size", "self_target", "future_target"),
    *("past_target", "add_bos_token", "max_target_positions", "shorten_method", "pad_to_fixed_length"),
)
# what the plugin's task takes from the command's configuration (tasks/flags.py), which is not at hand there
_COMMAND_FIELDS = (
    *("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16", "skip_invalid_size_inputs_valid_test"),
)
# of a decoder-only model: field -> a part of the keys that it adds. The release hands these fields on from a Namespace
# alone, so that one that it trained by a configuration has them and lacks what they say
_NORM_FORMER = {"scale_attn": ".attn_ln.", "scale_fc": ".ffn_layernorm.", "scale_heads": ".c_attn"}
_NORM_FORMER |= {"scale_resids": ".w_resid"}


def served_config(state: Mapping[str, Any], overrides: Mapping[str, Any]) -> DictConfig:
    """`model`, a Namespace, and `task` of the checkpoint `state` under fairseq's `--model-overrides`.

    state: as `read_checkpoint` gives it. ConfigError where a field is not what it must be, or where the configuration
    has more layers than the state.
    """
    overrides = plain(dict(overrides))
    model = model_fields(state, overrides)
    overridden = _overridden(overrides, "task")
    of_task = _task({**task_fields(state), **overridden}, overridden.get("data"), bool(expert_counts(state["model"])))
    config = OmegaConf.create({"model": None, "task": of_task}, flags={"allow_objects": True})
    config.model = _complete(model, of_task)
    return config


def model_fields(state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The model's part of the configuration as serving reads it; ConfigError as in `served_config`."""
    model = parse_model_fields(_upgraded({**_fields(state, "model"), **_overridden(overrides or {}, "model")}))
    name = model.get("_name") or model.get("arch")
    if not name:
        raise ConfigError(f"a configuration must name the model's architecture, got {shown(name)}")
    model |= {"_name": name, "arch": name}
    if layer_count(state["model"], "encoder") == 0:
        for field, part in _NORM_FORMER.items():
            if model.get(field) and not any(part in key for key in state["model"]):
                model[field] = False
    settle_kept_layers(model, _overridden(overrides or {}, "model"), state["model"])
    _check_layers(model, state["model"])
    return model


def task_fields(state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the checkpoint, under `--model-overrides`, says of the task that it was trained for, as plain data."""
    return {**_fields(state, "task"), **_overridden(overrides or {}, "task")}


def criterion_fields(state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The loss that the checkpoint was trained with under `--model-overrides`, or the one that fairseq-validate's
    `--criterion` puts in its place: its `_name`, its numbers, switches and words."""
    fields, given = _fields(state, "criterion"), _overridden(overrides or {}, "criterion")
    name = fields.get("_name", fields.get("criterion"))
    if isinstance(given.get("criterion"), str):
        name, fields = given["criterion"], {}
    values = {field: value for field, value in {**fields, **given}.items() if _is_plain(value)}
    return {**values, "_name": name if isinstance(name, str) else None}


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float) or isinstance(value, str) and "$" not in value  # no interpolation


def _fields(state: Mapping[str, Any], group: str) -> dict[str, Any]:
    """A group of the configuration; `args`, which older checkpoints have, is all groups in one."""
    args, cfg = state.get("args"), state.get("cfg")
    found = args if args is not None else cfg.get(group) if isinstance(cfg, dict) else None
    if isinstance(found, Namespace):
        found = vars(found)
    if not isinstance(found, dict):
        if group != "model":
            return {}
        raise ConfigError(f"not a fairseq checkpoint: its configuration must describe the {group}, got {shown(found)}")
    return {name: value for name, value in found.items() if not (args is not None and name == "_name")}


def _overridden(overrides: Mapping[str, Any], group: str) -> dict[str, Any]:
    nested = overrides.get(group)
    given = {**overrides, **(nested if isinstance(nested, dict) else {})}
    return {name: value for name, value in given.items() if not isinstance(value, dict)}


def _upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """Old checkpoints have one number of positions for both sides."""
    if "max_positions" in fields and "max_source_positions" not in fields:
        fields |= {f"max_{side}_positions": fields["max_positions"] for side in ("source", "target")}
    return fields


def _check_layers(model: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    counts = {side: layer_count(tensors, side) for side in ("encoder", "decoder")}
    # the last two stand in no field of their own: all sides', and parts that are no layers of a side
    rules = {f"{side}_": count for side, count in counts.items()} | {"": max(counts.values())}
    for prefix, count in rules.items():
        for field in ("layers", "layers_to_keep"):
            value = model.get(f"{prefix}{field}")
            layers = len(value.split(",")) if isinstance(value, str) else value or 0
            if layers > count:
                raise ConfigError(f"{prefix}{field} must name at most the {count} layers of the state, got {layers:,}")
    for field in ("base_layers", "base_sublayers", "char_embedder_highway_layers"):
        if (model.get(field) or 0) > max(len(tensors), 2):
            raise ConfigError(f"{field} must be at most the {len(tensors)} tensors of the state, got {model[field]:,}")


def _complete(model: dict[str, Any], task: Mapping[str, Any]) -> Namespace:
    """With what fairseq's configuration of a language model takes from the task's."""
    for name, default in (("add_bos_token", False), ("tokens_per_sample", 1024), ("max_target_positions", None)):
        if model.get(name) is None:
            model[name] = task.get(name, default)
    return namespace({**model, "tpu": False})


def _task(fields: Mapping[str, Any], data: Any, has_experts: bool) -> dict[str, Any]:
    """Of a language model's task all that fairseq sets it up with (--lm-path), by our task where it has experts; of
    other tasks nothing."""
    name = fields.get("_name", fields.get("task"))
    if name not in _LM_TASKS:
        return {"_name": None}
    parsed = parse_fields({field: fields[field] for field in _LM_FIELDS if field in fields}, LanguageModelingConfig)
    parsed |= {"seed": 1, "batch_size": None, "batch_size_valid": None, "dataset_impl": None, "data_buffer_size": 10}
    parsed |= {"tpu": False, "use_plasma_view": False, "plasma_path": ""}
    if has_experts or name == "moe_language_modeling":
        name = "moe_language_modeling"
        parsed |= dict.fromkeys(_COMMAND_FIELDS, False)
    return {**parsed, "data": data, "_name": name}
