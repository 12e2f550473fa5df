"""upstream's `-shard{i}` files: full copies, or the flat shards of fairscale's FullyShardedDataParallel.

Source: `--ddp-backend fully_sharded --use-sharded-state` in upstream's trainer, which keeps the shards' description
under `shard_metadata` (branches `moe` and `nllb`) or `fsdp_metadata` (release). Consolidated weights lie in memory as
a whole before the model takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_moe_ext.serving.checkpoint_file import read_file
from fairseq_moe_ext.serving.checkpoint_files import CheckpointError
from fairseq_moe_ext.serving.loading import Loading

Shard = tuple[Path, dict[str, Tensor], dict[str, Any] | None]  # a file, its model and its metadata
METADATA = ("shard_metadata", "fsdp_metadata")


def read_shards(files: Sequence[Path], loading: Loading, has_experts: bool = True) -> tuple[dict[str, Any], bool]:
    """As `read_file`, of a checkpoint whose model lies in `files`, shard 0 first; the rest of the content is shard 0's.

    has_experts: whether all that the metadata names must be there; a shared file lacks the experts.
    """
    state, had_optimizer = read_file(files[0], loading)
    metadata = _metadata(state)
    if metadata is None or not _is_cut(state["model"], metadata):
        return state, had_optimizer  # a full copy, as every other one is
    states = [state, *(read_file(file, loading)[0] for file in files[1:])]
    shards = [(file, each["model"], _metadata(each)) for file, each in zip(files, states, strict=True)]
    state["model"] = _consolidate(shards, strict=has_experts)
    return {key: value for key, value in state.items() if key not in METADATA}, had_optimizer


def read_rank_shard(file: Path, loading: Loading) -> dict[str, Any]:
    """A rank file of experts, which FSDP wraps in groups of one: each file is consolidated by itself."""
    state, _ = read_file(file, loading)
    metadata = _metadata(state)
    if metadata is not None and _is_cut(state["model"], metadata):
        state["model"] = _consolidate([(file, state["model"], metadata)], strict=False)
    return {key: value for key, value in state.items() if key not in METADATA}


def _metadata(state: dict[str, Any]) -> dict[str, Any] | None:
    return next((state[name] for name in METADATA if state.get(name)), None)


def _is_cut(model: dict[str, Tensor], metadata: dict[str, Any]) -> bool:
    """Whether a parameter that the metadata describes lies in `model` in another shape than its own."""
    for unit in metadata.get("param_metadata", ()):
        for name, param in unit["params"].items():
            tensor = model.get(_key(unit["fsdp_path"], name))
            if tensor is not None and (list(param["names"]) != [name] or tensor.shape != param["shapes"][0]):
                return True
    return False


def _consolidate(shards: list[Shard], strict: bool) -> dict[str, Tensor]:
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    first = shards[0][2]["param_metadata"]
    for file, model, metadata in shards:
        if metadata is None:
            raise CheckpointError(f"{file}: it must hold {' or '.join(METADATA)} as {shards[0][0].name} does")
        if set(model) != set(shards[0][1]) or len(metadata["param_metadata"]) != len(first):
            raise CheckpointError(f"{file}: it must hold the same flat parameters as {shards[0][0].name}")
    for number, unit in enumerate(first):
        for name in unit["params"]:
            key = _key(unit["fsdp_path"], name)
            if key in shards[0][1]:
                _check_sizes(shards, number, name, key, alone=unit["no_broadcast_optim_state"])
            elif strict:
                raise CheckpointError(f"{shards[0][0]}: its metadata names {key}, which is not there")
    try:
        consolidated = FullyShardedDataParallel.consolidate_shard_weights(
            [model for _, model, _ in shards], [metadata for _, _, metadata in shards], strict=strict
        )
    except CheckpointError:
        raise
    except Exception as error:  # metadata comes from the file
        raise CheckpointError(f"{shards[0][0]}: fairscale cannot consolidate the shards: {error!r}") from error
    # fairscale 0.4.13 gives shared parameters back for the last wrapped module alone
    for unit in first:
        for source, destination in unit["shared_param_info"]:
            source, destination = _key(unit["fsdp_path"], source), _key(unit["fsdp_path"], destination)
            if source in consolidated:
                consolidated.setdefault(destination, consolidated[source])
    return consolidated


def _check_sizes(shards: list[Shard], number: int, name: str, key: str, alone: bool) -> None:
    found = 0
    for _, model, metadata in shards[:1] if alone else shards:
        found += model[key].numel() - metadata["param_metadata"][number]["params"][name]["padding"]
    needed = sum(shards[0][2]["param_metadata"][number]["params"][name]["numels"])
    if found != needed:
        raise CheckpointError(
            f"{shards[0][0]}: {key} must have {needed} values in all shards together, "
            f"found {found} in {len(shards)} files: a shard is missing"
        )


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
