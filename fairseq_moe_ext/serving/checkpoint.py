"""Any layout of checkpoint files -> one state with every expert under its global number.

Legend: R = rank files, L = experts in each, E = experts of the model (upstream's `moe_expert_count`).
Layout: upstream's `moe_checkpoint_utils.py`. A pickle is read by PyTorch's safe loader with an allow-list, never by an
unsafe load.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe_ext.serving.checkpoint_files import CheckpointError, CheckpointFiles, find_checkpoint_files

logger = logging.getLogger("fairseq_moe_ext")

# what fairseq's checkpoints hold besides tensors and plain containers
SAFE_GLOBALS = [argparse.Namespace]

EXPERT_KEY = re.compile(r"^(.*\.moe_layer\.experts\.)(\d+)(\..+)$")
GATE_KEY = re.compile(r"^(.*\.moe_layer)\.gate\.wg\.weight$")
OLD_NAMES = ((".alpha2", ".w_resid"),)  # nllb's name -> the release's


def read_checkpoint(path: str) -> dict[str, Any]:
    """The state of the checkpoint at `path`, as fairseq's loader gives it, without the optimizer's."""
    files = find_checkpoint_files(path)
    if files.whole is not None:
        state = _read_file(files.whole)
    else:
        state = _merge(files)
    model = state["model"]
    for key in list(model):
        for old, new in OLD_NAMES:
            if key.endswith(old):
                model[key.removesuffix(old) + new] = model.pop(key)
    return state


def is_expert_key(key: str) -> bool:
    """Upstream's rule for what stands in rank files."""
    return "expert" in key and "expert_centroids" not in key


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


def _read_file(file: Path) -> dict[str, Any]:
    """One checkpoint file by the safe loader; its optimizer state, the bulk, is dropped at once."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: the safe loader refuses it: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{file}: not a fairseq checkpoint: it must hold a dict with the key 'model'")
    state.pop("last_optimizer_state", None)
    return state


def _merge(files: CheckpointFiles) -> dict[str, Any]:
    """The shared file's model and the rank files' experts; everything else is rank 0's, as upstream merges them."""
    shared = _read_file(files.shared)["model"]
    num_experts = expert_count(shared)
    if num_experts == 0:
        raise CheckpointError(f"{files.shared}: rank files stand beside it, but it holds no gate of a MoE layer")
    state = _read_file(files.ranks[0])
    experts = _global_experts(state["model"], files.ranks[0], first=0)
    per_file = _experts_per_file(state["model"], files.ranks[0])
    needed, remainder = divmod(num_experts, per_file)
    if remainder or needed > len(files.ranks):
        raise CheckpointError(
            f"{files.ranks[0]}: {len(files.ranks)} rank files with {per_file} experts each must cover the model's "
            f"{num_experts} experts; " + _first_missing(num_experts, per_file * len(files.ranks))
        )
    if len(files.ranks) > needed:
        logger.info("%d rank files hold replicas; the first %d cover every expert", len(files.ranks), needed)
    for rank, file in enumerate(files.ranks[1:needed], start=1):
        model = _read_file(file)["model"]
        if _experts_per_file(model, file) != per_file:
            raise CheckpointError(
                f"{file}: every rank file must hold {per_file} experts per layer as {files.ranks[0].name} does, "
                f"got {_experts_per_file(model, file)}"
            )
        experts.update(_global_experts(model, file, first=rank * per_file))
    state["model"] = OrderedDict({**shared, **experts})
    return state


def _first_missing(num_experts: int, found: int) -> str:
    return f"expert {found} is missing" if found < num_experts else "the number of experts per file does not divide it"


def _experts_per_file(model: dict[str, Tensor], file: Path) -> int:
    """L; the local numbers in every layer must run from 0 without a gap."""
    numbers: dict[str, set[int]] = {}
    for match in map(EXPERT_KEY.match, model):
        if match:
            numbers.setdefault(match.group(1), set()).add(int(match.group(2)))
    counts = {len(found) for found in numbers.values()}
    if len(counts) != 1 or any(max(found) + 1 != len(found) for found in numbers.values()):
        raise CheckpointError(f"{file}: a rank file must hold the same experts 0, 1, ... in every MoE layer")
    return counts.pop()


def _global_experts(model: dict[str, Tensor], file: Path, first: int) -> dict[str, Tensor]:
    """A rank file's experts with local number j under their global one, `first` + j."""
    experts = {}
    for key, tensor in model.items():
        match = EXPERT_KEY.match(key)
        if match is None:
            if is_expert_key(key):
                raise CheckpointError(f"{file}: not a key of an expert in a MoE layer: {key}")
            continue
        prefix, number, rest = match.groups()
        experts[f"{prefix}{first + int(number)}{rest}"] = tensor
    return experts
