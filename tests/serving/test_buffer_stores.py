"""A checkpoint as its own store, or a file built of it: every layout, and what happens to the files meanwhile."""

import logging
import shutil

import commands
import pytest
import torch
from buffer_makers import buffered
from checkpoint_makers import split
from served_models import Loader, logits

from fairseq_moe_ext.buffering.store import StoreError
from fairseq_moe_ext.gating import MOELayer, ResidentExperts, Top2Gate
from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.expert_buffer import BufferSettings, ExpertBuffer


@pytest.fixture(autouse=True)
def without_gradients():
    """As in serving: with them experts go another way."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loader(shared_goldens):
    return Loader(shared_goldens)


def as_it_is(state, folder):
    torch.save(state, folder / "X.pt")
    return folder / "X.pt", False


def old_format(state, folder):
    torch.save(state, folder / "X.pt", _use_new_zipfile_serialization=False)
    return folder / "X.pt", True


def without_checksums(state, folder):
    torch.serialization.set_crc32_options(False)
    torch.save(state, folder / "X.pt")
    torch.serialization.set_crc32_options(True)
    return folder / "X.pt", False


def strided(state, folder):
    model = {key: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for key, tensor in state["model"].items()}
    torch.save({**state, "model": model}, folder / "X.pt")
    return folder / "X.pt", True


def one_storage(state, folder):
    """As a model that was trained with this package is saved: an expert is a part of a record."""
    model = {}
    for key, tensor in state["model"].items():
        model[key] = torch.cat([tensor.new_zeros(1, *tensor.shape[1:]), tensor])[1:]
    torch.save({**state, "model": model}, folder / "X.pt")
    return folder / "X.pt", False


def rank_files(state, folder):
    split(state["model"], 2, folder, template=lambda tensors: {**state, "model": tensors})
    return folder / "X.pt", False


@pytest.fixture
def copied(shared_goldens, tmp_path):
    """A golden that a test may damage."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in (shared_goldens / "lm_top2").glob("checkpoint_last-*.pt"):
        shutil.copy(file, folder)
    return folder / "checkpoint_last-shared.pt"


def rows() -> torch.Tensor:
    return torch.randint(4, 1800, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", [as_it_is, one_storage, without_checksums])
def test_the_checkpoint_is_changed_while_serving(loader, shared_goldens, tmp_path, layout):
    """Written over in place, in every expert of a layer."""
    state = commands.read_state(shared_goldens / "mt_plain" / "checkpoint_merged.pt")
    path, _ = layout(state, tmp_path)
    model = loader.load("mt_plain", {}, *buffered(1, "--expert-store", "disk"), path=path)
    wanted = loader.logits("mt_plain", {}, path=path)
    assert torch.equal(logits(model), wanted)
    content = path.read_bytes()
    with open(path, "r+b") as file:
        for expert in range(8):
            weight = state["model"][f"decoder.layers.1.moe_layer.experts.{expert}.fc1.weight"]
            file.seek(content.index(weight.numpy().tobytes()))
            file.write(bytes(100))
    with pytest.raises(CheckpointError, match="was changed while it was in use|is damaged"):
        logits(model)


def test_the_checkpoint_is_deleted_while_serving(loader, copied):
    model = loader.load("lm_top2", {}, *buffered(1, "--expert-store", "disk"), path=copied)
    shutil.rmtree(copied.parent)
    assert torch.equal(model(rows())[0], loader.load("lm_top2", {})(rows())[0])


def test_a_built_store_is_reused_and_belongs_to_its_checkpoint(loader, copied, tmp_path, caplog):
    flags = buffered(1, "--expert-store", "disk", "--expert-store-dir", tmp_path / "store")

    def served():
        caplog.clear()
        with caplog.at_level(logging.INFO, "fairseq_moe_ext"):
            return loader.load("lm_top2", {}, *flags, path=copied)(rows())[0]

    wanted = served()
    assert caplog.text.count("experts were written to") == 2
    assert torch.equal(served(), wanted)
    assert caplog.text.count("experts are read from") == 2
    state = commands.read_state(copied.with_name("checkpoint_last-rank-0.pt"))
    for key in state["model"]:
        state["model"][key] *= 1.01
    torch.save(state, copied.with_name("checkpoint_last-rank-0.pt"))
    other = served()
    assert caplog.text.count("built anew") == 2 and "another checkpoint" in caplog.text
    assert not torch.equal(other, wanted)
    assert torch.equal(other, loader.load("lm_top2", {}, path=copied)(rows())[0])


@pytest.mark.parametrize("layout", [old_format, without_checksums, strided, one_storage, rank_files])
def test_every_layout_of_a_checkpoint(loader, shared_goldens, tmp_path, layout):
    """Where the checkpoint's records can be read in place no second copy is written; else it stands beside it."""
    state = commands.read_state(shared_goldens / "mt_plain" / "checkpoint_merged.pt")
    path, builds = layout(state, tmp_path)
    for flags in (buffered(2, "--expert-store", "disk"), buffered(2, "--expert-store", "host")):
        found = loader.logits("mt_plain", {}, *flags, path=path)
        assert torch.equal(found, loader.logits("mt_plain", {}, path=path))
    built = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    sides = ("decoder", "encoder") if builds else ()
    assert built == [f"X.{side}.layers.1.moe_layer.safetensors" for side in sides]


def test_a_store_that_cannot_be_written(loader, tmp_path):
    (tmp_path / "file").write_text("")
    flags = buffered(2, "--expert-store", "disk", "--expert-store-dir", tmp_path / "file" / "folder")
    with pytest.raises(StoreError, match="the expert store cannot be written: .*--expert-store-dir"):
        loader.load("lm_top2", {}, *flags)


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_that_share_a_folder_have_files_of_their_own(tmp_path, size):
    """Each with its share of one layer's experts, and one process with all of them."""
    torch.manual_seed(0)
    state = ResidentExperts(4, 6, 5).state_dict()
    name = "decoder.layers.1.moe_layer"
    for _ in range(2):
        for held in ((0, 1), (2, 3), (0, 3), (0, 1, 2, 3)):
            with torch.device("meta"):
                layer = MOELayer(Top2Gate(6, 4), ResidentExperts(4, 6, 5, held=held))
            layer.gate.to_empty(device="cpu")
            buffer = ExpertBuffer(BufferSettings(size, "all", "lru", "ascending", "disk", tmp_path))
            buffer.install({name: layer})
            resident = ResidentExperts(4, 6, 5, held=held)
            for experts in (layer.experts, resident):
                experts.eval().load_state_dict(state)
            buffer.start(layer)
            rows, counts = torch.randn(2 * len(held), 6), [2] * len(held)
            with torch.no_grad():
                assert torch.equal(layer.experts(rows, counts), resident(rows, counts))
        assert len(list(tmp_path.iterdir())) == 4
        assert len({file.stat().st_ino for file in tmp_path.iterdir()}) == 4
