"""Checkpoint files for the tests: a tiny state whose experts prove themselves, and any layout of its shards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

EXPERT = re.compile(r"(.*\.moe_layer\.experts\.)(\d+)(\..*)")
LAYERS = (1, 3)


def proving_state(num_experts: int) -> dict[str, torch.Tensor]:
    """A model's state in which every expert's tensors are full of 100 * layer + its global number."""
    model = {"decoder.embed_tokens.weight": torch.arange(12.0).view(4, 3)}
    for layer in LAYERS:
        prefix = f"decoder.layers.{layer}.moe_layer"
        model[f"{prefix}.gate.wg.weight"] = torch.arange(3.0 * num_experts).view(num_experts, 3)
        for expert in range(num_experts):
            for name, shape in (("fc1.weight", (5, 3)), ("fc1.bias", (5,)), ("fc2.weight", (3, 5)), ("fc2.bias", (3,))):
                model[f"{prefix}.experts.{expert}.{name}"] = torch.full(shape, float(100 * layer + expert))
    return model


def whole(model: dict[str, torch.Tensor], **more) -> dict:
    """A checkpoint file's content as fairseq writes it."""
    content = {"args": None, "cfg": {"model": {"_name": "transformer_lm"}}, "model": model, "criterion": None}
    content |= {"optimizer_history": [{}], "task_state": {}, "extra_state": {}}
    return {**content, "last_optimizer_state": {"state": torch.ones(7)}, **more}


def split(
    model: dict[str, torch.Tensor], ranks: int, folder: Path, stem: str = "X", replicas: int = 1, template=whole
) -> list[Path]:
    """Write `stem`-shared.pt and `ranks` * `replicas` rank files with an equal part of the experts in each."""
    experts = {key: EXPERT.fullmatch(key) for key in model if EXPERT.fullmatch(key)}
    num_experts = 1 + max(int(match.group(2)) for match in experts.values())
    assert num_experts % ranks == 0
    per_file = num_experts // ranks
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(template({key: model[key] for key in model if key not in experts}), folder / f"{stem}-shared.pt")
    files = []
    for rank in range(ranks * replicas):
        shard = {}
        for key, match in experts.items():
            owner, local = divmod(int(match.group(2)), per_file)
            if owner == rank % ranks:
                shard[f"{match.group(1)}{local}{match.group(3)}"] = model[key]
        files.append(folder / f"{stem}-rank-{rank}.pt")
        torch.save(template(shard), files[-1])
    return files


def assert_same_state(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], skip: Iterable[str] = ()):
    """The same keys and, bit by bit, the same tensors."""
    skip = set(skip)
    assert set(found) - skip == set(wanted) - skip
    for key in set(wanted) - skip:
        assert torch.equal(found[key], wanted[key]), key
