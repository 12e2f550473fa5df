"""Any layout of checkpoint files -> one state with every expert under its global number.

Legend: R = rank files, L = experts in each, E = experts of the model (upstream's `moe_expert_count`).
Layout: upstream's `moe_checkpoint_utils.py`. A pickle is read by PyTorch's safe loader with an allow-list, never by an
unsafe load.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_moe_ext.checkpoints.checkpoint_file import FileContent, read_file
from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.find_files import CheckpointFiles, find_checkpoint_files
from fairseq_moe_ext.checkpoints.fsdp_shards import read_rank_shard, read_shards
from fairseq_moe_ext.checkpoints.kept_experts import KEPT, KeptExperts
from fairseq_moe_ext.checkpoints.loading import BAR_DELAY, Loading, ModelState
from fairseq_moe_ext.checkpoints.quantized_about import QuantizedAbout
from fairseq_moe_ext.checkpoints.quantized_state import is_quantized, read_quantized
from fairseq_moe_ext.checkpoints.rank_files import check_of_one_model, experts_per_file, global_experts
from fairseq_moe_ext.checkpoints.state_keys import expert_count, expert_counts, is_expert_key

logger = logging.getLogger("fairseq_moe_ext")

OLD_NAMES = ((".alpha2", ".w_resid"),)  # nllb's name -> the release's


def read_checkpoint(path: str, rename: bool = True) -> dict[str, Any]:
    """The state of the checkpoint at `path`, as fairseq's loader gives it, without the optimizer's.

    Its `model` is a ModelState whose tensors are read where they are used; CheckpointError where a file is wrong.
    rename: give keys that only upstream's branches have the release's names.
    """
    files = find_checkpoint_files(path)
    loading = Loading(path)
    with loading.timed():
        try:
            content, about = (_merge(files, loading), None) if files.ranks else _read_whole(files, loading)
        except CheckpointError:
            raise
        except Exception as error:  # a file may hold anything where this code expects something
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error
        model = content.state["model"]
        for key in list(model) if rename else ():
            if (name := renamed(key)) != key:
                model[name] = model.pop(key)
        found = ModelState(model, loading, content.had_optimizer, about)
        found.kept = _kept(path, content, about)
        return {**content.state, "model": found}


def renamed(key: str) -> str:
    """The release's name of what only upstream's branches have."""
    for old, new in OLD_NAMES:
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _read_whole(files: CheckpointFiles, loading: Loading) -> tuple[FileContent, QuantizedAbout | None]:
    about = None
    if files.shards:
        content = read_shards(files.shards, loading)
    elif is_quantized(files.whole):
        content, about = read_quantized(files.whole, loading)
        if about.kept is not None:  # of layers unlike each other
            return content, about
    else:
        content = read_file(files.whole, loading)
    _expert_count_in(files.whole, content)
    return content, about


def _kept(path: str, content: FileContent, about: QuantizedAbout | None) -> KeptExperts | None:
    """What a pruned model's checkpoint has kept; CheckpointError unless its gates score these."""
    extra = content.state.get("extra_state")
    value = extra.get(KEPT) if isinstance(extra, dict) else None
    try:
        kept = KeptExperts.from_json(value) if value is not None else None if about is None else about.kept
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if kept is not None:
        found = expert_counts(content.state["model"])
        if {name: count for name, count in found.items() if ".cmr_layer." not in name} != kept.counts:
            raise CheckpointError(f"{path}: its gates must score the experts that it says it has kept, found {found}")
    return kept


def _expert_count_in(file: Path, content: FileContent) -> int:
    try:
        return expert_count(content.state["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _merge(files: CheckpointFiles, loading: Loading) -> FileContent:
    """The shared file's model and the rank files' experts; everything else is rank 0's, as upstream merges them.

    What rank 0 does not say is the shared file's: tools that cut a checkpoint leave rank files with experts alone.
    """
    if files.shards:
        content = read_shards(files.shards, loading, has_experts=False)
    else:
        content = read_file(files.shared, loading)
    shared = content.state
    num_experts = _expert_count_in(files.shared, content)
    if num_experts == 0:
        raise CheckpointError(f"{files.shared}: rank files stand beside it, but it holds no gate of a MoE layer")
    state = read_rank_shard(files.ranks[0], loading)
    per_file = experts_per_file(state["model"], files.ranks[0])
    needed = _needed_ranks(files, num_experts, per_file)
    states = [state]
    for file in tqdm(files.ranks[1:needed], desc="reading rank files", unit="file", delay=BAR_DELAY, leave=False):
        states.append(read_rank_shard(file, loading))
        if experts_per_file(states[-1]["model"], file) != per_file:
            raise CheckpointError(
                f"{file}: every rank file must hold {per_file} experts per layer as {files.ranks[0].name} does, "
                f"got {experts_per_file(states[-1]['model'], file)}"
            )
    check_of_one_model(shared, files.shared, states, files.ranks[:needed])
    experts = {}
    for rank, (file, each) in enumerate(zip(files.ranks, states, strict=False)):
        experts.update(global_experts(each["model"], file, first=rank * per_file))
    not_experts = {key: tensor for key, tensor in shared["model"].items() if not is_expert_key(key)}
    told = {name: value for name, value in shared.items() if state.get(name) is None}
    return FileContent({**state, **told, "model": {**not_experts, **experts}}, content.had_optimizer)


def _needed_ranks(files: CheckpointFiles, num_experts: int, per_file: int) -> int:
    """How many of the rank files cover every expert; the others hold replicas."""
    found = len(files.ranks)
    needed, remainder = divmod(num_experts, per_file)
    if remainder or needed > found:
        first = per_file * found
        reason = f"expert {first} is missing" if first < num_experts else f"{per_file} does not divide {num_experts}"
        raise CheckpointError(
            f"{files.ranks[0]}: {found} rank files with {per_file} experts each must cover the model's "
            f"{num_experts} experts; {reason}"
        )
    if found > needed:
        logger.info("%d rank files hold replicas; the first %d cover every expert", found, needed)
    return needed
