"""NLLB-200 as Meta published it: two rank files for each expert, expert output masking, padding in decoding.

With 8 experts in 16 files, and, marked slow, with 128 in 256 as published.
"""

from __future__ import annotations

import math
from pathlib import Path

import checkpoint_makers
import commands
import hf_makers
import numpy as np
import pytest
import torch

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.nllb.convert import convert_nllb

SOURCES = ["the quick brown fox jumps over the lazy dog", "ten days", "we sell", "four swiss francs of september"]
SEARCH = ("--beam", "2", "--max-len-b", "8")
TARGETS = ["der hund", "vier", "der schnelle fuchs springt", "ueber"]


@pytest.fixture(scope="module", params=[8, pytest.param(128, marks=pytest.mark.slow)])
def served(request, tmp_path_factory):
    """(fairseq-generate's arguments without --path, the merged checkpoint, one of Meta's files)"""
    work = tmp_path_factory.mktemp("meta")
    hf_makers.write_model(work / "hf", num_experts=request.param, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8)
    done = convert_nllb(str(work / "hf"), str(work / "merged.pt"))
    state = read_checkpoint(str(done.files[0]))
    model = {key: tensor.read() for key, tensor in state["model"].items()}
    args = {key: value for key, value in vars(state["args"]).items() if value is not None}
    args |= {"encoder_moe_freq": 0, "decoder_moe_freq": 0}  # upstream's branch knows moe_freq alone
    content = {**state, "args": type(state["args"])(**args)}
    checkpoint_makers.split(
        model, request.param, work / "meta", replicas=2, template=lambda tensors: {**content, "model": tensors}
    )
    texts = {"eng_Latn": SOURCES, "deu_Latn": TARGETS}
    data = hf_makers.write_sentences(work / "data", work / "hf" / "sentencepiece.bpe.model", done.files[1], texts)
    flags = ("--task", "moe_translation_multi_simple_epoch", "-s", "eng_Latn", "-t", "deu_Latn", "--cpu")
    flags += ("--lang-pairs", "eng_Latn-deu_Latn", "--fixed-dictionary", done.files[1], "--lang-dict", done.files[2])
    flags += (*done.task_flags.split(), "--num-workers", "0")
    return (data, *flags), done.files[0], work / "meta" / "X.pt"


def scores(arguments: tuple, path: Path, **overrides) -> np.ndarray:
    found = commands.generate(*arguments, "--path", path, "--score-reference", overrides=overrides)
    rows = {number: row for batch in found.batches for number, row in zip(batch.ids, batch.scores, strict=True)}
    return np.concatenate([rows[number] for number in sorted(rows)])


def test_all_files_serve_as_the_merged_one_does(served):
    arguments, merged, meta = served
    assert len(list(meta.parent.glob("X-rank-*.pt"))) in (2 * 8, 2 * 128)
    overrides = {"replication_count": 2, "world_size": 8}  # upstream's command has these
    np.testing.assert_array_equal(scores(arguments, meta, **overrides), scores(arguments, merged))
    whole, parts = (commands.generate(*arguments, *SEARCH, "--path", path).lines for path in (merged, meta))
    assert [line for line in whole if line[0] in "HD"] == [line for line in parts if line[0] in "HD"]


def test_the_experts_output_is_scaled_by_0_8(served, tmp_path):
    """As if the experts' last layers were smaller by that factor."""
    arguments, merged, _ = served
    state = read_checkpoint(str(merged))
    assert state["args"].moe_eom == 0.2
    model = {key: tensor.read() for key, tensor in state["model"].items()}
    for key, tensor in model.items():
        if ".experts." in key and ".fc2." in key:
            tensor *= 0.8
    state["args"].moe_eom = 0.0
    torch.save({**state, "model": model}, tmp_path / "twin.pt")
    found, wanted = scores(arguments, merged), scores(arguments, tmp_path / "twin.pt")
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert not np.allclose(scores(arguments, merged, moe_eom=0.0), found, atol=1e-2)


def test_a_decoded_tokens_score_is_its_teacher_forced_one(served):
    """Padded sources in one batch, step by step, against one pass over each hypothesis alone."""
    arguments, merged, _ = served
    found = commands.generate(*arguments, *SEARCH, "--path", merged, "--batch-size", "4")
    model, task = commands.load("generate", *arguments, "--path", merged)
    words, sources, hypotheses = task.target_dictionary, dict(found.of_kind("S")), dict(found.hypotheses())
    for number, (scores_of_tokens,) in found.of_kind("P"):
        source = words.encode_line(sources[number][0], add_if_not_exist=False).long()[None]
        target = words.encode_line(f"__deu_Latn__ {hypotheses[number]}", add_if_not_exist=False).long()[None]
        previous = torch.cat((target[:, -1:], target[:, :-1]), dim=1)
        with torch.no_grad():
            logits = model(source, torch.tensor([source.size(1)]), previous)[0]
        wanted = logits.log_softmax(-1).gather(2, target[..., None]).flatten() / math.log(2)
        np.testing.assert_allclose([float(score) for score in scores_of_tokens.split()], wanted.numpy(), atol=2e-4)


def test_the_converted_file_is_the_disk_store_as_it_is(served):
    arguments, merged, _ = served
    before = sorted(merged.parent.iterdir())
    resident = commands.generate(*arguments, *SEARCH, "--path", merged).lines
    buffered = commands.generate(
        *arguments, *SEARCH, "--path", merged, "--expert-buffer-size", "2", "--expert-store", "disk"
    ).lines
    assert buffered == resident
    assert sorted(merged.parent.iterdir()) == before
