"""Buffered experts for the tests, over every kind of store, with the resident ones they must equal."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.expert_file import open_or_build
from fairseq_moe_ext.buffering.host_tier import HostTier
from fairseq_moe_ext.buffering.store import FileStore, HostStore, LazyTensors
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.experts.resident import ResidentExperts

STORES = ("host", "lazy", "file", "tier")
MODEL_DIM, HIDDEN_DIM = 6, 5
_numbers = itertools.count()


def resident_experts(
    num_experts: int, dtype=torch.float32, local=None, seed: int = 0, activation=torch.tanh
) -> ResidentExperts:
    torch.manual_seed(seed)
    experts = ResidentExperts(num_experts, MODEL_DIM, HIDDEN_DIM, activation, local=local)
    return experts.to(dtype).eval().requires_grad_(False)


def make_store(kind: str, folder: Path | None, weights: list[list[Tensor]], dtype: torch.dtype, local):
    weights = [[part.clone() for part in parts] for parts in weights]  # the store's own
    if kind == "host":
        return HostStore(weights, dtype)
    if kind == "lazy":
        return FileStore(LazyTensors(weights), dtype)
    file = open_or_build(folder / f"{next(_numbers)}.safetensors", local, weights, "fingerprint")
    return FileStore(file, dtype) if kind == "file" else HostTier(FileStore(file, dtype), capacity=2)


def buffered_twin(
    resident: ResidentExperts,
    size: int,
    store: str = "host",
    folder: Path | None = None,
    policy: str = "lfu",
    order: str = "resident-first",
    dtype=torch.float32,
    ranking=None,
) -> BufferedExperts:
    """Started, with the resident experts' weights, in `dtype` before it takes them."""
    local = resident.local

    def make(weights, as_dtype):
        assert len(weights) == len(local) and len(weights[0]) == len(EXPERT_KEYS)
        return make_store(store, folder, weights, as_dtype, local)

    experts = BufferedExperts(
        resident.num_experts, MODEL_DIM, HIDDEN_DIM, resident.activation,
        make_store=make, policy=policy, order=order, local=local,
    )
    experts.to(dtype).eval().load_state_dict(resident.state_dict())
    experts.start(size, ranking)
    return experts


def buffered(size, *more) -> tuple[str, ...]:
    """A command's flags."""
    return "--expert-buffer-size", str(size), *map(str, more)


def weights_of(num_experts: int, dtype=torch.float32, seed: int = 0) -> list[list[Tensor]]:
    """Every expert's parts."""
    experts = resident_experts(num_experts, dtype, seed=seed)
    return [[getattr(experts, name).detach()[expert] for name in EXPERT_KEYS] for expert in range(num_experts)]


def assert_file_serves(file, weights: list[list[Tensor]]) -> None:
    for expert, parts in enumerate(weights):
        targets = [torch.empty_like(part) for part in parts]
        assert FileStore(file, parts[0].dtype).load(expert, targets) == sum(part.nbytes for part in parts)
        for target, part in zip(targets, parts, strict=True):
            assert torch.equal(target, part)
