"""Any layout of checkpoint files written anew: as one file, or as upstream's shared file and rank files.

The weights are copied bit by bit under upstream's names; the optimizer's state is left out. Of `merge`, the whole model
lies in memory once; of `split`, one file at a time.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_ext.atomic_file import WriteError, new_file
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.conversion_lock import only_writer
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.find_files import NAME
from fairseq_moe_ext.checkpoints.kept_experts import KEPT, cut_experts
from fairseq_moe_ext.checkpoints.kept_source import Keep
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY, expert_count, experts_by_layer, is_expert_key
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor


def merge(
    source: str, target: str, drop_optimizer: bool = False, force: bool = False, keep: Keep | None = None
) -> list[Path]:
    """Write the checkpoint at `source` as the one file `target`; returns the files written.

    keep: whose experts are written alone, as many of each layer; None: all.
    CheckpointError where `source` has an optimizer state, which cannot be merged, and drop_optimizer is not given;
    where `target` exists and force is not given; where it cannot be written.
    """
    file = _target(target)
    with only_writer(file):
        state = _read(source, drop_optimizer, keep)
        return _write({file: lambda: {**state, "model": _ordinary(state["model"])}}, force)


def split(
    source: str,
    target: str,
    ranks: int,
    drop_optimizer: bool = False,
    force: bool = False,
    keep: Keep | None = None,
) -> list[Path]:
    """Write the checkpoint at `source` as `X-shared.pt` and `ranks` files `X-rank-{r}.pt`, where `target` is `X.pt`.

    Rank r holds the experts from r * E / ranks on under local numbers, and says its rank in its configuration.
    Errors as in `merge`, and where the number of experts E is no multiple of `ranks`.
    """
    file = _target(target)
    with only_writer(file):
        return _write(_parts(source, _read(source, drop_optimizer, keep), file, ranks), force)


def _parts(
    source: str, state: dict[str, Any], file: Path, ranks: int
) -> dict[Path, Callable[[], dict[str, Any]]]:
    """The files of `split` and what makes their content."""
    num_experts = expert_count(state["model"])
    if num_experts == 0:
        raise CheckpointError(f"{source}: a checkpoint must have MoE layers to be split, found no gate")
    if ranks < 1 or num_experts % ranks:
        raise CheckpointError(f"--ranks must divide the model's {num_experts} experts, got {ranks}")
    files = [file.with_name(f"{file.stem}-rank-{rank}.pt") for rank in range(ranks)]
    for other in sorted(file.parent.glob("*.pt")):
        match = NAME.fullmatch(other.name)
        if match and match.group(1) == file.stem and (match.group(2) or "").startswith("-rank") and other not in files:
            raise CheckpointError(f"{other}: it would be taken for a part of the new checkpoint: remove it first")
    shared = {key: tensor for key, tensor in state["model"].items() if not is_expert_key(key)}
    contents = {file.with_name(f"{file.stem}-shared.pt"): lambda: {**_of_rank(state, 0), "model": _ordinary(shared)}}
    for rank, rank_file in enumerate(files):
        contents[rank_file] = lambda rank=rank: {
            **_of_rank(state, rank),
            "model": _ordinary(_local_experts(state["model"], rank, num_experts // ranks)),
        }
    return contents


def _read(source: str, drop_optimizer: bool, keep: Keep | None) -> dict[str, Any]:
    state = read_checkpoint(source, rename=False)
    if state["model"].about is not None:
        raise CheckpointError(
            f"{source}: a quantised checkpoint must stay one file, of which each rank reads its own experts: it is "
            "neither merged nor split"
        )
    if state["model"].had_optimizer and not drop_optimizer:
        raise CheckpointError(f"{source}: it holds an optimizer state, which is not converted: give --drop-optimizer")
    return state if keep is None else _pruned(source, state, keep)


def _pruned(source: str, state: dict[str, Any], keep: Keep) -> dict[str, Any]:
    """With the kept experts alone, of which the checkpoint says that it has no others."""
    model = state["model"]
    if model.kept is not None:
        raise CheckpointError(f"{source}: it holds a pair's experts alone already: --keep needs the whole model")
    kept = keep.of_model(experts_by_layer(model))
    counts = sorted(set(kept.counts.values()))
    if len(counts) > 1:
        raise CheckpointError(
            f"--keep {keep.path} must keep as many experts of every layer, since a checkpoint of fairseq's has one "
            f"moe_expert_count, got {counts[0]} to {counts[-1]}: fairseq-moe quantize --keep writes others"
        )
    try:
        cut_experts(model, kept)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    state = _of_group(state, "model", "moe_expert_count", counts[0])
    extra = state.get("extra_state")
    return {**state, "extra_state": {**(extra if isinstance(extra, dict) else {}), KEPT: asdict(kept)}}


def _target(target: str) -> Path:
    file = Path(target)
    match = NAME.fullmatch(file.name)
    if match is None or match.group(2) or match.group(3):
        raise CheckpointError(f"{target}: the new checkpoint must be named X.pt, without -shared, -rank-0 or -shard0")
    if not file.parent.is_dir():
        raise CheckpointError(f"{target}: the new checkpoint must lie in an existing folder")
    return file


def _local_experts(model: dict[str, Tensor], rank: int, per_file: int) -> dict[str, Tensor]:
    experts = {}
    for key, tensor in model.items():
        match = EXPERT_KEY.match(key)
        if match:
            prefix, number, rest = match.groups()
            owner, local = divmod(int(number), per_file)
            if owner == rank:
                experts[f"{prefix}{local}{rest}"] = tensor
    return experts


def _of_rank(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """The state as rank `rank` would have saved it: upstream's files tell in their configuration who wrote them."""
    state = _of_group(state, "distributed_training", "distributed_rank", rank)
    return _of_group(state, "checkpoint", "checkpoint_suffix", f"-rank-{rank}")


def _of_group(state: dict[str, Any], group: str, field: str, value: Any) -> dict[str, Any]:
    """The state with another value of a field of its configuration, where that has it."""
    cfg = state.get("cfg")
    if isinstance(cfg, dict) and group in cfg:
        cfg = {**cfg, group: _with_field(cfg[group], field, value)}
    return {**state, "cfg": cfg, "args": _with_field(state.get("args"), field, value)}


def _with_field(group: Any, field: str, value: Any) -> Any:
    if isinstance(group, dict) and field in group:
        return {**group, field: value}
    if isinstance(group, Namespace) and hasattr(group, field):
        return Namespace(**{**vars(group), field: value})
    return group


def _ordinary(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors read, each with a storage of its own; what was one tensor under two keys is so again."""
    read: dict[Any, Tensor] = {}
    ordinary = {}
    for key, tensor in model.items():
        place = tensor.place if isinstance(tensor, StoredTensor) else (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in read:
            read[place] = tensor.read() if isinstance(tensor, StoredTensor) else tensor.clone()
        ordinary[key] = read[place]
    return ordinary


def _write(contents: dict[Path, Callable[[], dict[str, Any]]], force: bool) -> list[Path]:
    """All files or none: each gets its name when the last one is written."""
    for file in contents:
        if file.exists() and not force:
            raise CheckpointError(f"{file}: it exists already: give --force to overwrite it")
    try:
        with ExitStack() as written:
            for file, content in contents.items():
                opened = written.enter_context(new_file(file))
                torch.save(content(), opened)
                opened.close()  # there may be hundreds
    except WriteError as error:
        raise CheckpointError(str(error)) from error
    return list(contents)
