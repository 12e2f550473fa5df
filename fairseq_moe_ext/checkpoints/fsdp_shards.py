"""upstream's `-shard{i}` files: full copies, or the flat shards of fairscale's FullyShardedDataParallel.

Source: `--ddp-backend fully_sharded --use-sharded-state` in upstream's trainer, which keeps the shards' description
under `shard_metadata` (branches `moe` and `nllb`) or `fsdp_metadata` (release). Consolidated weights lie in memory as
a whole before the model takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_moe_ext.checkpoints.checkpoint_file import FileContent, read_file
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.loading import Loading

METADATA = ("shard_metadata", "fsdp_metadata")


@dataclass(frozen=True)
class Shard:
    """One file of a model cut into flat parameters; metadata: fairscale's description of them, None where it lacks."""

    file: Path
    model: dict[str, Tensor]
    metadata: dict[str, Any] | None


def read_shards(files: Sequence[Path], loading: Loading, has_experts: bool = True) -> FileContent:
    """As `read_file`, of a checkpoint whose model lies in `files`, shard 0 first; the rest of the content is shard 0's.

    has_experts: whether all that the metadata names must be there; a shared file lacks the experts.
    """
    first = read_file(files[0], loading)
    shards = [_shard(files[0], first)]
    if not _is_cut(shards[0]):
        return first  # a full copy, as every other one is
    shards += [_shard(file, read_file(file, loading)) for file in files[1:]]
    return FileContent(_whole(first, _consolidate(shards, strict=has_experts)), first.had_optimizer)


def read_rank_shard(file: Path, loading: Loading) -> dict[str, Any]:
    """A rank file of experts, which FSDP wraps in groups of one: each file is consolidated by itself."""
    content = read_file(file, loading)
    shard = _shard(file, content)
    return _whole(content, _consolidate([shard], strict=False) if _is_cut(shard) else shard.model)


def _shard(file: Path, content: FileContent) -> Shard:
    metadata = next((content.state[name] for name in METADATA if content.state.get(name)), None)
    return Shard(file, content.state["model"], metadata)


def _whole(content: FileContent, model: dict[str, Tensor]) -> dict[str, Any]:
    return {**{key: value for key, value in content.state.items() if key not in METADATA}, "model": model}


def _is_cut(shard: Shard) -> bool:
    """Whether a parameter that the metadata describes lies in the model in another shape than its own."""
    for unit in (shard.metadata or {}).get("param_metadata", ()):
        for name, param in unit["params"].items():
            tensor = shard.model.get(_key(unit["fsdp_path"], name))
            if tensor is not None and (list(param["names"]) != [name] or tensor.shape != param["shapes"][0]):
                return True
    return False


def _consolidate(shards: list[Shard], strict: bool) -> dict[str, Tensor]:
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    first = shards[0]
    units = first.metadata["param_metadata"]
    for shard in shards:
        if shard.metadata is None:
            raise CheckpointError(f"{shard.file}: it must hold {' or '.join(METADATA)} as {first.file.name} does")
        if set(shard.model) != set(first.model) or len(shard.metadata["param_metadata"]) != len(units):
            raise CheckpointError(f"{shard.file}: it must hold the same flat parameters as {first.file.name}")
    for number, unit in enumerate(units):
        for name in unit["params"]:
            key = _key(unit["fsdp_path"], name)
            if key in first.model:
                _check_sizes(shards, number, name, key, alone=unit["no_broadcast_optim_state"])
            elif strict:
                raise CheckpointError(f"{first.file}: its metadata names {key}, which is not there")
    try:
        consolidated = FullyShardedDataParallel.consolidate_shard_weights(
            [shard.model for shard in shards], [shard.metadata for shard in shards], strict=strict
        )
    except CheckpointError:  # the weights are read only here, and may turn out damaged
        raise
    except Exception as error:  # metadata comes from the file
        raise CheckpointError(f"{first.file}: fairscale cannot consolidate the shards: {error!r}") from error
    # fairscale 0.4.13 gives shared parameters back for the last wrapped module alone
    for unit in units:
        for source, destination in unit["shared_param_info"]:
            source, destination = _key(unit["fsdp_path"], source), _key(unit["fsdp_path"], destination)
            if source in consolidated:
                consolidated.setdefault(destination, consolidated[source])
    return consolidated


def _check_sizes(shards: list[Shard], number: int, name: str, key: str, alone: bool) -> None:
    found = 0
    for shard in shards[:1] if alone else shards:
        found += shard.model[key].numel() - shard.metadata["param_metadata"][number]["params"][name]["padding"]
    needed = sum(shards[0].metadata["param_metadata"][number]["params"][name]["numels"])
    if found != needed:
        raise CheckpointError(
            f"{shards[0].file}: {key} must have {needed} values in all shards together, "
            f"found {found} in {len(shards)} files: a shard is missing"
        )


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
