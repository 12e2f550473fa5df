"""Several layers' copies at once, out of one checkpoint: each thread reads into memory of its own."""

from __future__ import annotations

import pytest
import torch
from checkpoint_makers import split, whole

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.store import FileStore, LazyTensors
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.experts.resident import ResidentExperts

EXPERTS, MODEL_DIM, HIDDEN_DIM, LAYERS = 6, 64, 2048, (0, 1, 2)


@pytest.fixture(scope="module")
def resident() -> list[ResidentExperts]:
    torch.manual_seed(0)
    return [ResidentExperts(EXPERTS, MODEL_DIM, HIDDEN_DIM).eval().requires_grad_(False) for _ in LAYERS]


def state_of(layers: list[ResidentExperts]) -> dict[str, torch.Tensor]:
    state = {"decoder.embed_tokens.weight": torch.zeros(4, MODEL_DIM)}
    for number, experts in enumerate(layers):
        prefix = f"decoder.layers.{number}.moe_layer"
        state[f"{prefix}.gate.wg.weight"] = torch.zeros(EXPERTS, MODEL_DIM)
        state |= {f"{prefix}.experts.{key}": tensor.clone() for key, tensor in experts.state_dict().items()}
    return state


def as_one_file(state, folder, checksums: bool):
    torch.serialization.set_crc32_options(checksums)
    torch.save(whole(state), folder / "X.pt")
    torch.serialization.set_crc32_options(True)


def in_one_storage(state, folder):
    """Every tensor is a part of a record."""
    state = {key: torch.cat([tensor.new_zeros(1, *tensor.shape[1:]), tensor])[1:] for key, tensor in state.items()}
    torch.save(whole(state), folder / "X.pt")


LAYOUTS = {
    "one file": lambda state, folder: as_one_file(state, folder, checksums=True),
    "no checksums": lambda state, folder: as_one_file(state, folder, checksums=False),
    "parts of records": in_one_storage,
    "rank files": lambda state, folder: split(state, 3, folder),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layers_fetch_from_one_checkpoint_at_once(resident, tmp_path, layout, dtype):
    """All layers are announced before the first is called, as where ranks are in different layers."""
    LAYOUTS[layout](state_of(resident), tmp_path)
    state = read_checkpoint(str(tmp_path / "X.pt"))["model"]
    layers, wanted = [], []
    for number, experts in enumerate(resident):
        prefix = f"decoder.layers.{number}.moe_layer.experts."
        layer = BufferedExperts(
            EXPERTS, MODEL_DIM, HIDDEN_DIM, policy="fifo", order="ascending",
            make_store=lambda weights, dtype: FileStore(LazyTensors(weights), dtype),
        ).eval().to(dtype)  # fmt: skip
        layer.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
        layer.start(1)
        layers.append(layer)
        twin = ResidentExperts(EXPERTS, MODEL_DIM, HIDDEN_DIM).to(dtype).eval().requires_grad_(False)
        twin.load_state_dict(experts.state_dict())
        wanted.append(twin)
    counts, rows = [1] * EXPERTS, torch.randn(EXPERTS, MODEL_DIM).to(dtype)
    wanted = [twin(rows, counts) for twin in wanted]
    for _ in range(8):
        for layer in layers:
            layer.prefetch(counts)
        for layer, outputs in zip(layers, wanted, strict=True):
            assert torch.equal(layer(rows, counts), outputs)
    assert {layer.totals.misses for layer in layers} == {8 * EXPERTS - 1}
