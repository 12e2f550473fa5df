"""Whole models under autocast, as fairseq-train's `--amp` computes them, beside fairseq's own dense model."""

import re

import commands
import pytest
import torch
from data_makers import MT_TRAINING, write_data
from model_makers import Vocabulary, dense_twin, language_model, sentences, translation_input, translation_model

from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion

# nothing is dropped, and weights sum to 1
WHOLE = {"moe_normalize_gate_prob_before_dropping": True, "moe_eval_capacity_token_fraction": 1.0}


def model_and_sample(kind: str, **fields):
    if kind == "lm":
        model, net_input, target = language_model(**fields), {"src_tokens": sentences()}, sentences(seed=5)
    else:
        model, net_input = translation_model(**fields), translation_input()
        target = net_input["prev_output_tokens"].clone()
    ntokens = int(target.ne(1).sum())
    return model.train(), {"net_input": net_input, "target": target, "ntokens": ntokens, "nsentences": len(target)}


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["lm", "mt"])
def test_experts_that_are_alike_compute_as_a_dense_model_under_autocast(kind, gating):
    model, sample = model_and_sample(kind, moe_gating=gating, **WHOLE)
    twin = dense_twin(model).eval()
    model.eval()
    with torch.no_grad():
        exact = twin(**sample["net_input"])[0]
        with autocast():
            found, wanted = model(**sample["net_input"])[0], twin(**sample["net_input"])[0]
    assert found.dtype == wanted.dtype
    real = sample["target"].ne(1)
    error, allowed = ((each.float() - exact)[real].norm() for each in (found, wanted))
    assert 0 < error < 2 * allowed


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["lm", "mt"])
def test_a_training_step_under_autocast(kind, gating):
    fields = {"moe_gating": gating, "moe_gating_use_fp32": True}
    model, sample = model_and_sample(kind, **fields)
    criterion = MoECrossEntropyCriterion(Vocabulary(), False, 0.3, "average", "none")
    losses, gradients = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _, logged = criterion(model, sample)
        loss.backward()
        losses.append(float(loss))
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.requires_grad]))
        assert logged["moe_loss"] > 0
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


TRAINING = ("--optimizer", "adam", "--lr", "0.01", "--max-tokens", "400", "--no-save", "--cpu", "--num-workers", "0")
TRAINING += ("--log-format", "simple", "--log-interval", "1", "--max-update", "4")


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_fairseq_trains_and_validates_with_amp(tmp_path, gating):
    """fairseq's autocast is of GPUs alone: on a CPU all of its machinery runs, and the numbers stay."""
    data = write_data(tmp_path / "data", ("en", "de"))
    options = (*MT_TRAINING, *TRAINING, "--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01")
    options += ("--moe-gating", gating, "--batch-size", "40")
    found = []
    for amp in ((), ("--amp",)):
        done = commands.run("train", data, *options, *amp)
        found.append(re.findall(r"inner_loss=([\d.]+)", done.stdout) + re.findall(r"inner_loss ([\d.]+)", done.stdout))
        assert re.search(r"valid on 'valid' subset .* inner_loss [\d.]+", done.stdout)
    assert found[0] == found[1] and len(found[0]) > 5
