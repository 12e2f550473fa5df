"""The loss is the inner criterion's plus the weighted gate loss; what is logged has upstream's names."""

import math

import pytest
import reference
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics
from model_makers import Vocabulary, dense_twin, language_model, sentences, translation_input, translation_model

from fairseq_moe_ext.criterions.gate_loss import METADATA_KEYS
from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_moe_ext.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropyCriterion

WEIGHT = 0.3


def criterion(kind: str, weight=WEIGHT, combine="average", transform="none", sentence_avg=False):
    task = Vocabulary()
    if kind == "plain":
        return MoECrossEntropyCriterion(task, sentence_avg, weight, combine, transform)
    return MoELabelSmoothedCrossEntropyCriterion(task, sentence_avg, 0.1, weight, combine, transform)


def inner_criterion(kind: str, sentence_avg=False):
    task = Vocabulary()
    if kind == "plain":
        return CrossEntropyCriterion(task, sentence_avg)
    return LabelSmoothedCrossEntropyCriterion(task, sentence_avg, 0.1)


def model_and_sample(kind: str, **fields):
    if kind == "lm":
        model, net_input = language_model(**fields), {"src_tokens": sentences()}
        target = sentences(seed=5)
    else:
        model, net_input = translation_model(**fields), translation_input()
        target = net_input["prev_output_tokens"].clone()
    ntokens = int(target.ne(1).sum())
    return model.train(), {"net_input": net_input, "target": target, "ntokens": ntokens, "nsentences": len(target)}


def gate_losses(model, sample) -> list[float]:
    """By the naive twin, of what the gates see in a forward pass in evaluation."""
    calls = []
    hooks = [
        layer.gate.register_forward_hook(lambda gate, inputs, _: calls.append((gate, *inputs)))
        for layer in model.moe_layers().values()
    ]
    with torch.no_grad():
        model(**sample["net_input"])
    for hook in hooks:
        hook.remove()
    losses = []
    for gate, tokens, padding_mask in calls:
        probabilities = torch.softmax(tokens @ gate.wg.weight.T, dim=1)
        padded = [False] * len(tokens) if padding_mask is None else padding_mask.tolist()
        losses.append(reference.gate_loss(probabilities, probabilities.argmax(dim=1).tolist(), padded))
    return losses


COMBINED = {
    ("average", "none"): lambda losses: sum(losses) / len(losses),
    ("sum", "none"): sum,
    ("average", "neg_log"): lambda losses: -math.log(sum(losses) / len(losses)),
    ("sum", "neg_log"): lambda losses: -math.log(sum(losses)),
}


@pytest.mark.parametrize("model_kind", ["lm", "mt"])
@pytest.mark.parametrize("kind", ["plain", "smoothed"])
@pytest.mark.parametrize(("combine", "transform"), COMBINED)
def test_loss_is_inner_loss_plus_weighted_gate_loss(model_kind, kind, combine, transform):
    model, sample = model_and_sample(model_kind, moe_gating_use_fp32=True)
    inner, size, _ = inner_criterion(kind)(model, sample)
    loss, sample_size, logged = criterion(kind, combine=combine, transform=transform)(model, sample)
    gate_loss = COMBINED[combine, transform](gate_losses(model, sample))
    assert sample_size == size == sample["ntokens"]
    assert gate_loss > 0.1 or transform == "neg_log"
    assert loss.item() == pytest.approx(inner.item() + WEIGHT * sample_size * gate_loss, rel=1e-5)
    assert float(logged["loss"]) == loss.item()
    assert float(logged["inner_loss"]) == pytest.approx(inner.item(), rel=1e-6)
    assert float(logged["moe_loss"]) == pytest.approx(sample_size * gate_loss, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("kind", ["plain", "smoothed"])
def test_sentences_may_be_the_size(kind):
    model, sample = model_and_sample("mt")
    loss, sample_size, logged = criterion(kind, sentence_avg=True)(model, sample)
    assert sample_size == 5
    wanted = float(logged["inner_loss"]) + WEIGHT * 5 * sum(gate_losses(model, sample)) / 4
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_a_weight_of_0_leaves_the_inner_loss():
    model, sample = model_and_sample("lm")
    loss, _, logged = criterion("plain", weight=0.0)(model, sample)
    assert loss.item() == float(logged["inner_loss"])


def test_the_gate_loss_reaches_the_gates_and_the_inner_loss_the_experts():
    model, sample = model_and_sample("lm")
    criterion("plain")(model, sample)[0].backward()
    for layer in model.moe_layers().values():
        assert layer.gate.wg.weight.grad.abs().max() > 0
        assert layer.experts.fc1_weight.grad.abs().max() > 0


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("top1", [False, True])
def test_logged_keys_are_upstreams(gating, top1):
    model, sample = model_and_sample("lm", moe_gating=gating, moe_top1_expert=top1)
    _, _, logged = criterion("plain")(model, sample)
    assert set(METADATA_KEYS) | {"loss", "inner_loss", "moe_loss", "batch_count"} <= set(logged)
    assert {"ntokens", "nsentences", "sample_size"} <= set(logged)
    assert logged["batch_count"] == 1
    assert 0 < float(logged["entropy_gating"]) <= math.log(4) + 1e-6
    assert 0 < float(logged["expert1_balance_top"]) <= 100
    assert float(logged["all_to_all_cpu_time_ms"]) == 0
    assert (float(logged["overflow_expert1"]) == 0) or gating == "static"
    assert (float(logged["expert2_balance_top"]) == 0) == top1


def reduced(kind, outputs) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as found:
        criterion(kind).reduce_metrics(outputs)
    return found.get_smoothed_values()


@pytest.mark.parametrize("kind", ["plain", "smoothed"])
def test_metrics_of_several_batches(kind):
    outputs = []
    for seed in (0, 1):
        model, sample = model_and_sample("lm", seed=seed)
        outputs.append(criterion(kind)(model, sample)[2])
    found = reduced(kind, outputs)
    tokens = sum(output["ntokens"] for output in outputs)
    assert set(METADATA_KEYS) <= set(found)
    assert found["moe_gate_loss"] == pytest.approx(sum(float(o["moe_loss"]) for o in outputs) / tokens, abs=1e-6)
    mean = sum(float(output["entropy_gating"]) for output in outputs) / 2
    assert found["entropy_gating"] == pytest.approx(mean, abs=1e-3)
    total = sum(float(output["loss"]) for output in outputs)
    assert found["loss"] == pytest.approx(total / tokens / math.log(2), abs=1e-3)
    if kind == "plain":
        inner = sum(float(output["inner_loss"]) for output in outputs) / tokens / math.log(2)
        assert found["inner_loss"] == pytest.approx(inner, abs=1e-3)
    else:
        inner = sum(float(output["nll_loss"]) for output in outputs) / tokens / math.log(2)
    assert found["ppl"] == pytest.approx(2**inner, rel=1e-2)  # of the language, not of the gates


@pytest.mark.parametrize("kind", ["plain", "smoothed"])
def test_dense_models_have_no_gate_loss(kind):
    model, sample = model_and_sample("mt")
    twin = dense_twin(model).train()
    loss, _, logged = criterion(kind)(twin, sample)
    assert loss.item() == pytest.approx(inner_criterion(kind)(twin, sample)[0].item(), rel=1e-6)
    assert "moe_loss" not in logged
    assert "moe_gate_loss" not in reduced(kind, [logged])


def test_a_serving_layer_has_no_gate_loss():
    model, sample = model_and_sample("lm")
    for number, layer in enumerate(model.moe_layers().values()):
        layer.prepare_for_serving(number)
    with pytest.raises(RuntimeError, match="gate loss"):
        criterion("plain")(model, sample)
