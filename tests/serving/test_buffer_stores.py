"""A checkpoint as its own store, or a file built of it: every layout, and what happens to the files meanwhile."""

import logging
import re
import shutil

import commands
import pytest
import torch
from buffer_makers import buffered
from checkpoint_makers import split
from served_models import Loader, logits

from fairseq_moe_ext.buffering.store import StoreError
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer, Top2Gate
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
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}
    assert len(first) == 2 and "may be deleted" not in caplog.text
    state = commands.read_state(copied.with_name("checkpoint_last-rank-0.pt"))
    for key in state["model"]:
        state["model"][key] *= 1.01
    torch.save(state, copied.with_name("checkpoint_last-rank-0.pt"))
    other = served()
    assert caplog.text.count("experts were written to") == 2 and "built anew" not in caplog.text
    assert "2 files of 0.00 GB" in caplog.text and "they may be deleted unless they are still served" in caplog.text
    assert all(str(file) in caplog.text and file.stat().st_mtime_ns == first[file] for file in first)
    assert not torch.equal(other, wanted)
    assert torch.equal(other, loader.load("lm_top2", {}, path=copied)(rows())[0])
    served()
    assert caplog.text.count("experts are read from") == 2 and "may be deleted" not in caplog.text
    assert len(list((tmp_path / "store").iterdir())) == 4


def test_two_checkpoints_of_one_name_share_a_folder(loader, shared_goldens, tmp_path):
    """Both are served, one after the other and again, and each file is written once."""
    state = commands.read_state(shared_goldens / "mt_plain" / "checkpoint_merged.pt")
    model = {key: tensor * 1.01 if ".experts." in key else tensor for key, tensor in state["model"].items()}
    paths = []
    for number, content in enumerate((state, {**state, "model": model})):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / "X.pt")
        torch.save(content, paths[-1])
    flags = buffered(2, "--expert-store", "disk", "--expert-store-dir", tmp_path / "store")
    models = [loader.load("mt_plain", {}, *flags, path=path) for path in paths]  # both at once
    written = {file: file.stat().st_ino for file in (tmp_path / "store").iterdir()}
    assert len(written) == 4
    for served in (models, [loader.load("mt_plain", {}, *flags, path=path) for path in paths]):
        for path, each in zip(paths, served, strict=True):
            assert torch.equal(logits(each), loader.logits("mt_plain", {}, path=path))
    assert {file: file.stat().st_ino for file in (tmp_path / "store").iterdir()} == written


@pytest.mark.parametrize("layout", [old_format, without_checksums, strided, one_storage, rank_files])
def test_every_layout_of_a_checkpoint(loader, shared_goldens, tmp_path, layout):
    """Where the checkpoint's records can be read in place no second copy is written; else it stands beside it."""
    state = commands.read_state(shared_goldens / "mt_plain" / "checkpoint_merged.pt")
    path, builds = layout(state, tmp_path)
    for flags in (buffered(2, "--expert-store", "disk"), buffered(2, "--expert-store", "host")):
        found = loader.logits("mt_plain", {}, *flags, path=path)
        assert torch.equal(found, loader.logits("mt_plain", {}, path=path))
    built = sorted(re.sub(r"\.[0-9a-f]{16}\.", ".*.", file.name) for file in tmp_path.glob("*.safetensors"))
    sides = ("decoder", "encoder") if builds else ()
    assert built == [f"X.{side}.layers.1.moe_layer.*.safetensors" for side in sides]


def test_a_store_that_cannot_be_written(loader, tmp_path):
    (tmp_path / "file").write_text("")
    flags = buffered(2, "--expert-store", "disk", "--expert-store-dir", tmp_path / "file" / "folder")
    with pytest.raises(StoreError, match="the expert store cannot be written: .*--expert-store-dir"):
        loader.load("lm_top2", {}, *flags)


def layer_with(held, settings: BufferSettings):
    """A layer whose `held` experts of 4 are as `settings` say, resident ones of the same weights, and the buffer."""
    torch.manual_seed(0)
    state = ResidentExperts(4, 6, 5).state_dict()
    with torch.device("meta"):
        layer = MOELayer(Top2Gate(6, 4), ResidentExperts(4, 6, 5, local=held))
    layer.gate.to_empty(device="cpu")
    buffer = ExpertBuffer(settings)
    buffer.install({"decoder.layers.1.moe_layer": layer})
    resident = ResidentExperts(4, 6, 5, local=held)
    for experts in (layer.experts, resident):
        experts.eval().load_state_dict(state)
    return layer, resident, buffer


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_that_share_a_folder_have_files_of_their_own(tmp_path, size, caplog):
    """Each with its share of one layer's experts, and one process with all of them."""
    for _ in range(2):
        for held in ((0, 1), (2, 3), (0, 3), (0, 1, 2, 3)):
            settings = BufferSettings(size, "all", "lru", "ascending", "disk", tmp_path)
            layer, resident, buffer = layer_with(held, settings)
            buffer.start(layer)
            rows, counts = torch.randn(2 * len(held), 6), [2] * len(held)
            assert torch.equal(layer.experts(rows, counts), resident(rows, counts))
        assert len(list(tmp_path.iterdir())) == 4
        assert len({file.stat().st_ino for file in tmp_path.iterdir()}) == 4
    assert "may be deleted" not in caplog.text


@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("size", ["auto", 1, 2])
def test_a_rank_that_holds_nothing_of_a_layer(tmp_path, size, store):
    layer, resident, buffer = layer_with((), BufferSettings(size, "all", "lru", "ascending", store, tmp_path))
    buffer.start(layer)
    assert torch.equal(layer.experts(torch.zeros(0, 6), []), resident(torch.zeros(0, 6), []))
    assert layer.experts.total_bytes == layer.experts.resident_bytes == 0 and layer.experts.resident_experts == []
    assert list(tmp_path.iterdir()) == []


def test_another_start_of_a_buffer_changes_nothing(tmp_path):
    layer, resident, buffer = layer_with((0, 1, 3), BufferSettings("auto", "all", "lru", "ascending", "disk", tmp_path))
    buffer.start(layer)
    pool = layer.experts.pool
    layer.experts.prefetch([1, 0, 1])
    buffer.start(layer)
    assert layer.experts.pool is pool
    rows = torch.randn(2, 6)
    assert torch.equal(layer.experts(rows, [1, 0, 1]), resident(rows, [1, 0, 1]))
    layer.double()
    buffer.start(layer)
    rows = rows.double()
    assert torch.equal(layer.experts(rows, [1, 0, 1]), resident.double()(rows, [1, 0, 1]))


def test_a_started_disk_store_has_main_memory_before_a_device(tmp_path):
    """The model moves once it is prepared; meta stands in for a GPU."""
    layer, _, buffer = layer_with((0, 1, 3), BufferSettings(1, "all", "lru", "ascending", "disk", tmp_path))
    buffer.start(layer)
    layer.experts.to("meta")
    layer.experts(torch.zeros(3, 6, device="meta"), [1, 1, 1])
    assert layer.experts.totals.disk_reads + layer.experts.totals.host_reads == 2
    layer.experts(torch.zeros(3, 6, device="meta"), [1, 1, 1])
    assert layer.experts.totals.host_reads >= 2
