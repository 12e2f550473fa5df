"""Layouts beside the common one: full copies, half precision, the file format and the key names of old."""

from __future__ import annotations

import commands
import pytest
import torch
from checkpoint_makers import assert_same_state, proving_state, split, whole
from fairseq import checkpoint_utils
from small_lm import served_state, small_lm
from torch import nn

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.find_files import find_checkpoint_files
from fairseq_moe_ext.serving import fairseq_hooks


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return small_lm(tmp_path_factory.mktemp("lm"))


def test_shards_that_are_full_copies(tmp_path):
    model = proving_state(4)
    torch.save(whole(model), tmp_path / "X-shard0.pt")
    torch.save(whole({}), tmp_path / "X-shard1.pt")  # what a rank other than 0 has to say
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], model)
    split(model, 2, tmp_path / "moe")
    for file in list((tmp_path / "moe").iterdir()):
        rank = file.stem.rpartition("-")[2]
        shards = (0, 1) if rank == "shared" else (int(rank),)
        for number in shards:
            file.with_name(f"{file.stem}-shard{number}.pt").write_bytes(file.read_bytes())
        file.unlink()
    for name in ("X.pt", "X-shared-shard1.pt", "X-rank-0-shard0.pt"):
        assert_same_state(read_checkpoint(str(tmp_path / "moe" / name))["model"], model)


def test_what_a_path_means_where_layouts_stand_beside_each_other(tmp_path):
    for name in ("X-shared", "X-rank-0", "X-shared-shard0", "X-rank-0-shard0", "X-shard0"):
        (tmp_path / f"{name}.pt").touch()
    names = {
        "X.pt": "X-shared.pt",
        "X-rank-0.pt": "X-shared.pt",
        "X-rank-0-shard0.pt": "X-shared-shard0.pt",
        "X-shard0.pt": "X-shard0.pt",
    }
    for given, first in names.items():
        assert find_checkpoint_files(str(tmp_path / given)).first.name == first
    (tmp_path / "X.pt").touch()
    assert find_checkpoint_files(str(tmp_path / "X.pt")).whole.name == "X.pt"


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (("X-shared", "X-rank-0", "X-rank-1", "X-rank-01"), "rank 1 must stand in one file, found X-rank-01.pt and"),
        (("X-shard0", "X-shard00"), "shard 0 must stand in one file"),
        (("X-shard0", "X-shard2"), "shard files must run from 0 to 2 with no gap; missing X-shard1.pt"),
        (("X-shared-shard0",), "X-shared-shard0.pt is there but no X-rank-0-shard0.pt"),
        (("X-rank-0-shard0",), "X-rank-0-shard0.pt is there but no X-shared-shard0.pt"),
    ],
)
def test_parts_missing_or_doubled(tmp_path, names, error):
    for name in names:
        (tmp_path / f"{name}.pt").touch()
    with pytest.raises(CheckpointError, match=error):
        find_checkpoint_files(str(tmp_path / "X.pt"))


def test_half_precision_is_served_in_float32_exactly(lm, tmp_path):
    data, content = lm
    half = {key: tensor.half() for key, tensor in content["model"].items()}
    split(half, 2, tmp_path, template=lambda tensors: {**content, "model": tensors})
    served = served_state(data, tmp_path / "X.pt")
    assert {tensor.dtype for tensor in served.values()} == {torch.float32}
    assert_same_state(served, {key: tensor.float() for key, tensor in half.items()})


def test_names_that_fairseq_has_given_up(lm, tmp_path):
    data, content = lm
    old = dict(content["model"])
    for number in range(4):
        prefix = f"decoder.layers.{number}"
        for rest in ("weight", "bias"):
            joined = [old.pop(f"{prefix}.self_attn.{name}_proj.{rest}") for name in "qkv"]
            old[f"{prefix}.self_attn.in_proj_{rest}"] = torch.cat(joined)
            for name, number_then in (("self_attn_layer_norm", 0), ("final_layer_norm", 2)):
                old[f"{prefix}.layer_norms.{number_then}.{rest}"] = old.pop(f"{prefix}.{name}.{rest}")
    torch.save({**content, "model": old}, tmp_path / "old.pt")
    assert_same_state(served_state(data, tmp_path / "old.pt"), content["model"])


def test_the_file_format_from_before_archives(lm, tmp_path):
    data, content = lm
    torch.save(content, tmp_path / "X.pt", _use_new_zipfile_serialization=False)
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], content["model"])
    assert_same_state(served_state(data, tmp_path / "X.pt"), content["model"])


def test_files_written_without_checksums(lm, tmp_path):
    _, content = lm
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "X.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], content["model"])


def test_tensors_of_any_shape_stride_and_type(tmp_path):
    base = torch.randn(6, 5)
    model = {"whole": base, "part": base[2:4], "turned": base.t(), "column": base[:, 1], "empty": torch.empty(0, 3)}
    model |= {"scalar": torch.tensor(3.0), "brain": base.bfloat16(), "flag": base > 0, "long": torch.arange(4)}
    model |= {"double": base.double(), "parameter": nn.Parameter(base.half()), "complex": torch.randn(3) * 1j}
    torch.save(whole(model), tmp_path / "X.pt")
    state = read_checkpoint(str(tmp_path / "X.pt"))["model"]
    assert_same_state(state, model)
    for key, tensor in model.items():
        stored = state[key]
        assert (stored.shape, stored.dtype, stored.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
        assert target.copy_(stored) is target
        assert torch.equal(target, tensor) and stored.tolist() == tensor.tolist()
        if not tensor.is_complex():
            other = torch.empty(tensor.shape, dtype=torch.float16).copy_(stored)
            assert torch.equal(other, tensor.to(torch.float16))
    torch.save(dict(state), tmp_path / "again.pt")
    assert_same_state(torch.load(tmp_path / "again.pt"), model)


def test_checkpoint_shard_count_is_not_needed(tmp_path):
    fairseq_hooks.install()
    split(proving_state(4), 2, tmp_path)

    def find(*arguments):  # as for one of the plugin's tasks
        with fairseq_hooks.serving():
            return checkpoint_utils.get_maybe_sharded_checkpoint_filename(*arguments)

    for name in ("X-shard0", "Y-shard0", "Y-shard1", "Z_part0", "Z_part1"):
        (tmp_path / f"{name}.pt").touch()
    for name in "XYZ":  # whatever stands there
        with pytest.raises(CheckpointError, match=f"--checkpoint-shard-count must be 1: .*{name}.pt .* got 2"):
            find(str(tmp_path / f"{name}.pt"), "", 0, 2)
    assert find(str(tmp_path / "X.pt"), "-rank-1", 0, 1) == str(tmp_path / "X-shared.pt")


def test_checkpoint_shard_count_is_refused_by_the_command(shared_goldens, tmp_path):
    data, merged = shared_goldens / "mt_plain" / "data-bin", shared_goldens / "mt_plain" / "checkpoint_merged.pt"
    for number in (0, 1):
        (tmp_path / f"X_part{number}.pt").symlink_to(merged.resolve())
    with pytest.raises(ValueError, match="^--checkpoint-shard-count is not needed, .*found without it, got 2 in"):
        commands.generate(data, "--path", tmp_path / "X.pt", *commands.MT, "--checkpoint-shard-count", 2)
