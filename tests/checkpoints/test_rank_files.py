"""Rank files that are not parts of one model, or not in order; a state that does not fit its model."""

from __future__ import annotations

import os
from pathlib import Path

import commands
import pytest
import torch
from checkpoint_makers import assert_same_state, proving_state, split
from data_makers import write_data
from small_lm import small_lm

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.rank_files import rank_told


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return small_lm(tmp_path_factory.mktemp("lm"))


def spoil(file: Path, change) -> None:
    content = commands.read_state(file)
    change(content)
    torch.save(content, file)


def told(rank: int):
    def change(content):
        content["cfg"] = {**content["cfg"], "distributed_training": {"distributed_rank": rank}}

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda content: content["model"].update({"decoder.layers.1.moe_layer.experts.0.fc1.weight": torch.ones(4, 3)}),
         r"rank files must be of one model: .*experts.0.fc1.weight is \(5, 3\) float32 in X-rank-0.pt, here \(4, 3\)"),
        (lambda content: content["model"].pop("decoder.layers.1.moe_layer.experts.0.fc1.weight"), "here missing"),
    ],
)  # fmt: skip
def test_rank_files_of_different_models(tmp_path, change, error):
    files = split(proving_state(8), 2, tmp_path)
    spoil(files[1], change)
    with pytest.raises(CheckpointError, match=f"X-rank-1.pt: {error}|X-rank-1.pt: .*{error}"):
        read_checkpoint(str(tmp_path / "X.pt"))


@pytest.mark.parametrize("told", [{"X-shared.pt": 9, "X-rank-1.pt": 9}, {"X-rank-0.pt": 9}, {"X-rank-3.pt": 0}])
def test_a_file_need_not_say_its_number_of_updates(tmp_path, told):
    split(proving_state(8), 4, tmp_path)
    for name, updates in told.items():
        spoil(tmp_path / name, lambda content, updates=updates: content.update(optimizer_history=says(updates)))
    spoil(tmp_path / "X-rank-2.pt", lambda content: content.pop("optimizer_history"))
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], proving_state(8))
    spoil(tmp_path / "X-rank-2.pt", lambda content: content.update(optimizer_history=says(7)))
    with pytest.raises(CheckpointError, match=r"all files must be of one checkpoint: X-.* (9|7|0) updates, .* (7|0)$"):
        read_checkpoint(str(tmp_path / "X.pt"))


def says(updates: int) -> list[dict]:
    return [{"num_updates": updates}]


def test_a_shared_file_of_another_model(tmp_path):
    split(proving_state(8), 2, tmp_path)
    spoil(tmp_path / "X-shared.pt", lambda content: content["model"].pop("decoder.layers.3.moe_layer.gate.wg.weight"))
    with pytest.raises(CheckpointError, match="X-shared.pt: it must have the MoE layer decoder.layers.3.moe_layer"):
        read_checkpoint(str(tmp_path / "X.pt"))
    wide = {f"decoder.layers.{layer}.moe_layer.gate.wg.weight": torch.ones(8, 7) for layer in (1, 3)}
    spoil(tmp_path / "X-shared.pt", lambda content: content["model"].update(wide))
    with pytest.raises(CheckpointError, match=r"model dim 7, an expert\'s fc1.weight is \(5, 3\)"):
        read_checkpoint(str(tmp_path / "X.pt"))


def test_swapped_rank_files_are_told_apart_where_they_say_their_rank(shared_goldens, tmp_path):
    for name in ("lm_top2_ws2", "mt_nllb_ws2"):
        folder = tmp_path / name
        folder.mkdir()
        for source, target in (("shared", "shared"), ("rank-0", "rank-1"), ("rank-1", "rank-0")):
            os.link(shared_goldens / name / f"checkpoint_last-{source}.pt", folder / f"X-{target}.pt")
        with pytest.raises(CheckpointError, match="X-rank-1.pt: rank files must stand .* by rank 0, .* rank 1"):
            read_checkpoint(str(folder / "X.pt"))


@pytest.mark.parametrize(("ranks", "is_served"), [((0, 0), True), ((0, 8), True), ((3, 2), False), ((2, 2), False)])
def test_the_order_of_ranks_counts_not_their_numbers(tmp_path, ranks, is_served):
    for file, rank in zip(split(proving_state(8), 2, tmp_path), ranks, strict=True):
        spoil(file, told(rank))
        assert rank_told(commands.read_state(file)) == rank
    if is_served:
        read_checkpoint(str(tmp_path / "X.pt"))
    else:
        with pytest.raises(CheckpointError, match="written by rank 2, the one before by rank"):
            read_checkpoint(str(tmp_path / "X.pt"))


def test_one_file_under_two_names(tmp_path):
    files = split(proving_state(8), 4, tmp_path)
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(CheckpointError, match="X-rank-2.pt: .* found the same ones in X-rank-1.pt"):
        read_checkpoint(str(tmp_path / "X.pt"))


def test_expert_count_and_dictionary_must_fit(lm, tmp_path):
    data, content = lm
    torch.save(content, tmp_path / "X.pt")
    with pytest.raises(CheckpointError, match="X.pt: moe_expert_count must be what .* gates score, 8, got 4"):
        commands.eval_lm(data, "--path", tmp_path / "X.pt", *commands.LM, overrides={"moe_expert_count": 4})
    other = write_data(tmp_path / "other", words=44)
    with pytest.raises(CheckpointError, match="X.pt: the dictionary must .*embed_tokens.weight has rows, 40, got 44"):
        commands.eval_lm(other, "--path", tmp_path / "X.pt", *commands.LM)
    key = "decoder.layers.1.moe_layer.experts.3.fc2.bias"
    model = {name: tensor for name, tensor in content["model"].items() if name != key}
    torch.save({**content, "model": model}, tmp_path / "X.pt")
    with pytest.raises(CheckpointError, match=r"X.pt: its tensors must fit .*Missing key.*experts.3.fc2.bias"):
        commands.eval_lm(data, "--path", tmp_path / "X.pt", *commands.LM)
