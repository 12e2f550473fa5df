"""Any layout of checkpoint files -> one state with every expert under its global number.

Legend: R = rank files, L = experts in each, E = experts of the model (upstream's `moe_expert_count`).
Layout: upstream's `moe_checkpoint_utils.py`. A pickle is read by PyTorch's safe loader with an allow-list, never by an
unsafe load.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fairseq_moe_ext.serving.checkpoint_file import read_file
from fairseq_moe_ext.serving.checkpoint_files import CheckpointError, CheckpointFiles, find_checkpoint_files
from fairseq_moe_ext.serving.fsdp_shards import read_rank_shard, read_shards
from fairseq_moe_ext.serving.loading import PATIENCE, Loading, ModelState
from fairseq_moe_ext.serving.rank_files import check_of_one_model, experts_per_file, global_experts, is_expert_key
from fairseq_moe_ext.serving.safe_loader import SAFE_GLOBALS

__all__ = ["SAFE_GLOBALS", "expert_count", "is_expert_key", "moe_layer_numbers", "read_checkpoint"]

logger = logging.getLogger("fairseq_moe_ext")

GATE_KEY = re.compile(r"^(.*\.moe_layer)\.gate\.wg\.weight$")
OLD_NAMES = ((".alpha2", ".w_resid"),)  # nllb's name -> the release's


def read_checkpoint(path: str, rename: bool = True) -> dict[str, Any]:
    """The state of the checkpoint at `path`, as fairseq's loader gives it, without the optimizer's.

    Its `model` is a ModelState whose tensors are read where they are used; CheckpointError where a file is wrong.
    rename: give keys that only upstream's branches have the release's names.
    """
    files = find_checkpoint_files(path)
    loading = Loading(path)
    with loading.timed():
        state, had_optimizer = _merge(files, loading) if files.ranks else _read_whole(files, loading)
        model = state["model"]
        for key in list(model) if rename else ():
            for old, new in OLD_NAMES:
                if key.endswith(old):
                    model[key.removesuffix(old) + new] = model.pop(key)
        state["model"] = ModelState(model, loading, had_optimizer)
    return state


def moe_layer_numbers(model: dict[str, Tensor], side: str) -> list[int]:
    """Which layers of `side` (`encoder` or `decoder`) are MoE layers, by the state's keys."""
    pattern = re.compile(rf"^{side}\.layers\.(\d+)\.moe_layer\.gate\.wg\.weight$")
    return sorted(int(match.group(1)) for match in map(pattern.match, model) if match)


def expert_count(model: dict[str, Tensor]) -> int:
    """E, by the gates' shape; 0 in a dense model."""
    counts = {tensor.size(0) for key, tensor in model.items() if GATE_KEY.match(key)}
    if len(counts) > 1:
        raise CheckpointError(f"the gates of one model must score the same number of experts, found {sorted(counts)}")
    return counts.pop() if counts else 0


def _read_whole(files: CheckpointFiles, loading: Loading) -> tuple[dict[str, Any], bool]:
    return read_shards(files.shards, loading) if files.shards else read_file(files.whole, loading)


def _merge(files: CheckpointFiles, loading: Loading) -> tuple[dict[str, Any], bool]:
    """The shared file's model and the rank files' experts; everything else is rank 0's, as upstream merges them."""
    if files.shards:
        shared, had_optimizer = read_shards(files.shards, loading, has_experts=False)
    else:
        shared, had_optimizer = read_file(files.shared, loading)
    try:
        num_experts = expert_count(shared["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{files.shared}: {error}") from error
    if num_experts == 0:
        raise CheckpointError(f"{files.shared}: rank files stand beside it, but it holds no gate of a MoE layer")
    state = read_rank_shard(files.ranks[0], loading)
    per_file = experts_per_file(state["model"], files.ranks[0])
    needed = _needed_ranks(files, num_experts, per_file)
    states = [state]
    for file in tqdm(files.ranks[1:needed], desc="reading rank files", unit="file", delay=PATIENCE, leave=False):
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
    return {**state, "model": {**not_experts, **experts}}, had_optimizer


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
