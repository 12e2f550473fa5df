"""Checkpoints of every kind of model are served as the model that was saved."""

import logging

import commands
import pytest
import torch
from checkpoint_makers import split
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.supported_fields import UnsupportedFieldError

HERE = ("--gen-subset", "test", "--cpu", "--num-workers", "0")
LM_SERVING = ("--task", "moe_language_modeling", "--tokens-per-sample", "16", *HERE)
MT_SERVING = ("--task", "moe_translation", *HERE)
SHORT = ("--beam", 2, "--max-len-b", 8)


@pytest.fixture(scope="module")
def lm_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("lm") / "data")


@pytest.fixture(scope="module")
def mt_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mt") / "data", ("en", "de"))


def served_lm(data, path, *flags, overrides=None):
    return commands.load("eval_lm", data, "--path", path, *LM_SERVING, *flags, overrides=overrides)[0]


def served_mt(data, path, *flags, overrides=None):
    return commands.load("generate", data, "--path", path, *MT_SERVING, *flags, overrides=overrides)[0]


def assert_same_model(served, saved) -> None:
    assert set(served.state_dict()) == set(saved.state_dict())
    for key, tensor in saved.state_dict().items():
        assert torch.equal(served.state_dict()[key], tensor), key
    tokens = torch.randint(4, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    net_input = {"src_tokens": tokens}
    if hasattr(saved, "encoder"):
        net_input |= {"src_lengths": torch.full((3,), 8), "prev_output_tokens": tokens.flip(1)}
    with torch.no_grad():
        torch.testing.assert_close(served(**net_input)[0], saved(**net_input)[0], rtol=1e-5, atol=1e-6)


LMS = {
    "top 2": (),
    "top 1": ("--moe-top1-expert",),
    "every layer": ("--moe-freq", 1),
    "by the decoder's frequency": ("--moe-freq", 0, "--decoder-moe-freq", 4),
    "cmr": ("--moe-cmr",),
    "normformer": ("--scale-fc", "--scale-attn", "--scale-heads", "--scale-resids"),
    "cmr with scale_fc": ("--moe-cmr", "--scale-fc"),
    "other dense layers in the experts' place": ("--alternate-decoder-ffn-embed-dim", 24),
    "eom and fom": ("--moe-eom", 0.2, "--moe-fom", 0.1),
    "gelu": ("--activation-fn", "gelu"),
}
MTS = {
    "top 2": (),
    "encoder alone": ("--moe-freq", 0, "--encoder-moe-freq", 2),
    "decoder alone": ("--moe-freq", 0, "--decoder-moe-freq", 1),
    "cmr": ("--moe-cmr",),
    "experts in the encoder, other dense layers in the decoder": ("--alternate-decoder-ffn-embed-dim", 24),
    "experts in the decoder, other dense layers in the encoder": ("--alternate-ffn-embed-dim", 24),
    "frequencies apart": ("--encoder-layers", 4, "--moe-freq", 2, "--encoder-moe-freq", 3),
}


@pytest.mark.parametrize("name", LMS)
def test_language_models(lm_data, tmp_path, name):
    saved = untrained_checkpoint(tmp_path / "X.pt", lm_data, *LM_TRAINING, *LMS[name])
    assert_same_model(served_lm(lm_data, tmp_path / "X.pt"), saved)


@pytest.mark.parametrize("name", MTS)
def test_translation_models(mt_data, tmp_path, name):
    saved = untrained_checkpoint(tmp_path / "X.pt", mt_data, *MT_TRAINING, *MTS[name])
    assert_same_model(served_mt(mt_data, tmp_path / "X.pt"), saved)


@pytest.mark.parametrize("flags", [(), ("--moe-cmr",)], ids=["top 2", "cmr"])
def test_shards_of_a_model_trained_here(mt_data, tmp_path, flags):
    saved = untrained_checkpoint(tmp_path / "whole.pt", mt_data, *MT_TRAINING, *flags)
    state = commands.read_state(tmp_path / "whole.pt")
    split(saved.state_dict(), 4, tmp_path, template=lambda model: {**state, "model": model})
    assert_same_model(served_mt(mt_data, tmp_path / "X.pt"), saved)


def test_arguments_of_old_checkpoints(mt_data, tmp_path):
    """`args` where newer ones have `cfg`."""
    saved = untrained_checkpoint(tmp_path / "X.pt", mt_data, *MT_TRAINING)
    state = commands.read_state(tmp_path / "X.pt")
    state |= {"args": state["cfg"]["model"], "cfg": None}
    torch.save(state, tmp_path / "X.pt")
    assert_same_model(served_mt(mt_data, tmp_path / "X.pt"), saved)


@pytest.mark.parametrize("kind", ["lm", "mt"])
def test_a_dense_checkpoint_is_served_as_what_it_is(lm_data, mt_data, tmp_path, kind, caplog):
    path = tmp_path / "X.pt"
    with caplog.at_level(logging.INFO, logger="fairseq_moe_ext"):
        if kind == "lm":
            training = ("--task", "language_modeling", "--arch", "transformer_lm", "--decoder-layers", 2)
            saved = untrained_checkpoint(path, lm_data, *training, "--decoder-embed-dim", 16)
            ours = commands.eval_lm(lm_data, "--path", path, *LM_SERVING)
            fairseqs = commands.eval_lm(lm_data, "--path", path, "--task", "language_modeling", *LM_SERVING[2:])
            assert ours.loss == pytest.approx(fairseqs.loss, abs=1e-6)
            served = served_lm(lm_data, path)
        else:
            training = ("--task", "translation", "--arch", "transformer", "-s", "en", "-t", "de")
            saved = untrained_checkpoint(path, mt_data, *training, "--encoder-embed-dim", 16, "--encoder-layers", 1)
            found = commands.generate(mt_data, "--path", path, *MT_SERVING, *SHORT, "--moe-report", tmp_path / "r")
            assert len(found.hypotheses()) == 20
            assert (tmp_path / "r").read_text().startswith("{")
            served = served_mt(mt_data, path)
    assert type(served) is type(saved)
    assert_same_model(served, saved)
    assert "no MoE layers: served as the dense model that it is" in caplog.text


def test_two_models_are_an_ensemble(mt_data, tmp_path):
    for number in (0, 1):
        untrained_checkpoint(tmp_path / f"{number}.pt", mt_data, *MT_TRAINING, seed=number)
    flags = (*MT_SERVING, "--beam", 2, "--score-reference")
    zero, one = (commands.generate(mt_data, "--path", tmp_path / f"{number}.pt", *flags) for number in (0, 1))
    both = commands.generate(mt_data, "--path", f"{tmp_path}/0.pt:{tmp_path}/1.pt", *flags)
    for a, b, mean in zip(zero.batches, one.batches, both.batches, strict=True):
        for x, y, z in zip(a.scores, b.scores, mean.scores, strict=True):
            pairs = torch.stack((torch.tensor(x), torch.tensor(y)))
            torch.testing.assert_close(torch.tensor(z), pairs.logsumexp(dim=0) - torch.tensor(2.0).log())


def changed(tmp_path, change) -> None:
    state = commands.read_state(tmp_path / "X.pt")
    change(state)
    torch.save(state, tmp_path / "X.pt")


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        ("moe_expert_count", 4, CheckpointError, "moe_expert_count must be .* 8, got 4"),
        ("alibi", True, UnsupportedFieldError, "alibi .* got True"),
        ("scale_heads_inside", True, UnsupportedFieldError, "scale_heads_inside .* got True"),
        ("moe_new_idea", 0.5, UnsupportedFieldError, "moe_new_idea .* got 0.5"),
        ("moe_second_expert_policy", "best", ValueError, "second_expert_policy .* got 'best'"),
    ],
)
def test_configurations_that_cannot_be_served(lm_data, tmp_path, field, value, error, words):
    untrained_checkpoint(tmp_path / "X.pt", lm_data, *LM_TRAINING)
    changed(tmp_path, lambda state: state["cfg"]["model"].update({field: value}))
    with pytest.raises(error, match=words):
        served_lm(lm_data, tmp_path / "X.pt")


def test_a_layer_without_any_feed_forward_is_refused(lm_data, tmp_path):
    untrained_checkpoint(tmp_path / "X.pt", lm_data, *LM_TRAINING, "--moe-freq", 1)

    def without_layer_1(state):
        state["model"] = {key: value for key, value in state["model"].items() if ".layers.1.moe" not in key}

    changed(tmp_path, without_layer_1)
    with pytest.raises(CheckpointError, match="its tensors must fit the model that its configuration describes"):
        served_lm(lm_data, tmp_path / "X.pt")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moe_dtype_serves_and_reports_half_precision(lm_data, tmp_path, dtype):
    untrained_checkpoint(tmp_path / "X.pt", lm_data, *LM_TRAINING)
    full = commands.eval_lm(lm_data, "--path", tmp_path / "X.pt", *LM_SERVING)
    report = tmp_path / "report.json"
    flags = ("--moe-dtype", dtype, "--moe-report", report)
    half = commands.eval_lm(lm_data, "--path", tmp_path / "X.pt", *LM_SERVING, *flags)
    assert half.loss == pytest.approx(full.loss, abs=0.05)
    assert half.loss != full.loss
    assert f'"dtype": "{dtype}"' in report.read_text()
