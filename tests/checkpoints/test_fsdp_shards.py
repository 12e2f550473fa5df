"""upstream's `--use-sharded-state`: flat shards made by fairscale itself, consolidated and served."""

from __future__ import annotations

import commands
import pytest
import torch
from checkpoint_makers import assert_same_state, split
from fairscale.nn import FullyShardedDataParallel
from small_lm import served_state, small_lm
from torch import nn

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.state_keys import is_expert_key


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return small_lm(tmp_path_factory.mktemp("lm"))


class FakeGroup:
    """A process group that is asked for its rank and size alone, as sharding does."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def module_tree(state: dict[str, torch.Tensor]) -> nn.Module:
    """Modules whose parameters have the state's names; tensors of one storage become one parameter."""
    root, parameters = nn.Module(), {}
    for key, tensor in state.items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if name == "version":
            module.register_buffer(name, tensor)
        else:
            module.register_parameter(name, parameters.setdefault(tensor.data_ptr(), nn.Parameter(tensor.clone())))
    return root


def wrap(module: nn.Module, rank: int, size: int, **more) -> FullyShardedDataParallel:
    group = FakeGroup(rank, size)
    device = torch.device("cpu")
    return FullyShardedDataParallel(module, group, group, compute_device=device, **more)


def fsdp_content(content: dict, model: dict, rank: int, size: int, metadata: str = "shard_metadata") -> dict:
    """What rank `rank` of `size` saves under upstream's `--use-sharded-state`: layers, experts and the rest wrapped."""
    root = module_tree(model)
    layers = root.decoder.layers
    for number, layer in list(layers.named_children()):
        if hasattr(layer, "moe_layer"):
            for expert, module in list(layer.moe_layer.experts.named_children()):
                alone = wrap(module, 0, 1, no_broadcast_optim_state=True)
                layer.moe_layer.experts.add_module(expert, alone)
        layers.add_module(number, wrap(layer, rank, size))
    root = wrap(root, rank, size)
    return {**content, "model": root.local_state_dict(), metadata: root.local_metadata_dict()}


def tied(model: dict) -> dict:
    return {**model, "decoder.output_projection.weight": model["decoder.embed_tokens.weight"]}


@pytest.mark.parametrize("metadata", ["shard_metadata", "fsdp_metadata"])
@pytest.mark.parametrize("size", [1, 3])
def test_flat_shards_of_a_dense_model(lm, tmp_path, size, metadata):
    _, content = lm
    model = tied({key: tensor for key, tensor in content["model"].items() if "moe_layer" not in key})
    for rank in range(size):
        torch.save(fsdp_content(content, model, rank, size, metadata), tmp_path / f"X-shard{rank}.pt")
    for name in ("X.pt", "X-shard0.pt"):
        state = read_checkpoint(str(tmp_path / name))
        assert_same_state(state["model"], model)
        assert metadata not in state


@pytest.fixture
def sharded_moe(lm, tmp_path):
    """X-shared-shard{r}.pt and X-rank-{r}-shard{r}.pt of two ranks with four experts each; the model they are of."""
    _, content = lm
    model = tied(content["model"])
    split(model, 2, tmp_path / "plain", template=lambda tensors: {**content, "model": tensors})
    shared = {key: tensor for key, tensor in model.items() if not is_expert_key(key)}
    for rank in range(2):
        experts = commands.read_state(tmp_path / "plain" / f"X-rank-{rank}.pt")["model"]
        saved = fsdp_content(content, {**shared, **experts}, rank, 2)
        for part, of_experts in (("shared", False), (f"rank-{rank}", True)):
            mine = {key: tensor for key, tensor in saved["model"].items() if is_expert_key(key) == of_experts}
            torch.save({**saved, "model": mine}, tmp_path / f"X-{part}-shard{rank}.pt")
    return tmp_path, model


@pytest.mark.parametrize("name", ["X", "X-shared-shard0", "X-shared-shard1", "X-rank-1-shard1", "X-rank-0"])
def test_flat_shards_of_a_moe_model(sharded_moe, name):
    folder, model = sharded_moe
    assert_same_state(read_checkpoint(str(folder / f"{name}.pt"))["model"], model)


def test_flat_shards_are_served(lm, sharded_moe):
    data, content = lm
    folder, model = sharded_moe
    torch.save({**content, "model": model}, folder / "whole.pt")
    assert_same_state(served_state(data, folder / "X.pt"), served_state(data, folder / "whole.pt"))


def test_a_missing_flat_shard_is_named(lm, sharded_moe, tmp_path):
    folder, _ = sharded_moe
    (folder / "X-shared-shard1.pt").unlink()
    with pytest.raises(CheckpointError, match="X-shared-shard0.pt: .*a shard is missing"):
        read_checkpoint(str(folder / "X.pt"))
    (folder / "X-rank-0-shard0.pt").unlink()
    with pytest.raises(CheckpointError, match="missing X-rank-0-shard0.pt"):
        read_checkpoint(str(folder / "X.pt"))


def test_shards_of_different_models_are_named(lm, tmp_path):
    _, content = lm
    model = tied({key: tensor for key, tensor in content["model"].items() if "moe_layer" not in key})
    for rank in range(2):
        some = model if rank == 0 else {key: tensor for key, tensor in model.items() if ".layers.2." not in key}
        torch.save(fsdp_content(content, some, rank, 2), tmp_path / f"X-shard{rank}.pt")
    with pytest.raises(CheckpointError, match="X-shard1.pt: it must hold the same flat parameters as X-shard0.pt"):
        read_checkpoint(str(tmp_path / "X.pt"))
