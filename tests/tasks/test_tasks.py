"""The tasks: what serves and what trains, data and checkpoints that do not fit, fairseq's options of generation."""

import logging

import commands
import numpy as np
import pytest
from data_makers import LM_TRAINING, MT_TRAINING, training_configuration, untrained_checkpoint, write_data
from fairseq import tasks

HERE = ("--gen-subset", "test", "--cpu", "--num-workers", "0")
LM_SERVING = ("--task", "moe_language_modeling", "--tokens-per-sample", "16", *HERE)
MT_SERVING = ("--task", "moe_translation", "--beam", "2", "--max-len-b", "8", *HERE)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """(data folder, checkpoint)"""
    folder = tmp_path_factory.mktemp("lm")
    untrained_checkpoint(folder / "X.pt", write_data(folder / "data"), *LM_TRAINING)
    return folder / "data", folder / "X.pt"


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mt")
    untrained_checkpoint(folder / "X.pt", write_data(folder / "data", ("en", "de")), *MT_TRAINING)
    return folder / "data", folder / "X.pt"


def generate(served, *flags, **kwargs):
    data, path = served
    return commands.generate(data, "--path", path, *MT_SERVING, *flags, **kwargs)


@pytest.mark.parametrize(("served", "training"), [("lm", LM_TRAINING), ("mt", MT_TRAINING)])
def test_a_task_that_trains_does_not_serve(request, served, training):
    data, _ = request.getfixturevalue(served)
    cfg = training_configuration(data, *training)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    assert task.observer is None
    assert not any(layer.serving for layer in model.moe_layers().values())
    assert {layer.gating for layer in model.moe_layers().values()} == {"dynamic"}


def test_training_follows_the_flags_too(mt):
    cfg = training_configuration(mt[0], *MT_TRAINING, "--moe-gating", "static", "--batch-size", "8")
    layers = tasks.setup_task(cfg.task).build_model(cfg.model).moe_layers().values()
    assert {layer.gating for layer in layers} == {"static"}
    assert {layer.dispatcher.options.batch_size for layer in layers} == {8}


def test_serving_prepares_every_layer(mt):
    model, task = commands.load("generate", mt[0], "--path", mt[1], *MT_SERVING)
    assert task.observer is not None
    assert all(layer.serving for layer in model.moe_layers().values())


def test_one_line_in_the_log_says_what_was_served(mt, caplog):
    with caplog.at_level(logging.INFO, logger="fairseq_moe_ext"):
        generate(mt)
    served = [record.message for record in caplog.records if record.message.startswith("served:")]
    assert len(served) == 1
    assert "dynamic gating; encoder " in served[0]
    assert "of 8 experts active in a pass; 0 of " in served[0]


def test_the_fraction_under_dynamic_gating_is_refused(lm):
    rule = "--moe-eval-capacity-token-fraction needs --moe-gating static, got 0.01 with dynamic gating"
    with pytest.raises(ValueError, match=rule):
        commands.eval_lm(lm[0], "--path", lm[1], *LM_SERVING, "--moe-eval-capacity-token-fraction", "0.01")


@pytest.mark.parametrize(
    ("kind", "command", "serving"), [("lm", "generate", MT_SERVING), ("mt", "eval_lm", LM_SERVING)]
)
def test_a_task_that_does_not_fit_the_checkpoint(request, lm, mt, kind, command, serving):
    other_data = (mt if kind == "lm" else lm)[0]
    with pytest.raises(ValueError, match="--task does not fit the checkpoint"):
        commands.load(command, other_data, "--path", request.getfixturevalue(kind)[1], *serving)


@pytest.mark.parametrize("languages", [(), ("en", "de")])
def test_an_empty_data_set_is_named(tmp_path, lm, mt, languages):
    data = write_data(tmp_path / "data", languages, splits={"test": 0})
    with pytest.raises(ValueError, match="--gen-subset test: .* must hold a sentence"):
        if languages:
            generate((data, mt[1]))
        else:
            commands.eval_lm(data, "--path", lm[1], *LM_SERVING)


def test_world_sizes_are_refused_where_data_would_be_lost(mt, lm):
    with pytest.raises(SystemExit):
        generate(mt, "--distributed-world-size", "8")
    few = ("--batch-size", 2)  # each part has batches
    parts = [
        commands.eval_lm(lm[0], "--path", lm[1], *LM_SERVING, *few, "--num-shards", 2, "--shard-id", shard)
        for shard in (0, 1)
    ]
    assert not set(parts[0].by_id()) & set(parts[1].by_id())
    assert set(parts[0].by_id()) | set(parts[1].by_id()) == set(
        commands.eval_lm(lm[0], "--path", lm[1], *LM_SERVING).by_id()
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--nbest", "2"),
        ("--sampling", "--sampling-topk", "3"),
        ("--diverse-beam-groups", "2"),
        ("--prefix-size", "2"),
        ("--print-alignment",),
        ("--lenpen", "0.5", "--no-repeat-ngram-size", "2"),
        ("--batch-size", "7"),
        ("--max-tokens", "64", "--skip-invalid-size-inputs-valid-test"),
    ],
    ids=" ".join,
)
def test_fairseqs_options_of_generation(mt, flags):
    found = generate(mt, *flags)
    nbest = 2 if "--nbest" in flags else 1
    assert len(found.hypotheses()) == 20 * nbest
    assert np.isfinite(found.scores()).all()
    if "--print-alignment" in flags:
        assert len(found.of_kind("A")) == 20
    if "--prefix-size" in flags:
        targets = dict(found.of_kind("T"))
        for number, words in found.hypotheses():
            assert words.split()[:2] == targets[number][0].split()[:2]


def test_random_policies_follow_the_seed(lm):
    def loss(seed: int, policy: str) -> float:
        overrides = {"moe_second_expert_policy": policy}
        return commands.eval_lm(lm[0], "--path", lm[1], *LM_SERVING, "--seed", seed, overrides=overrides).loss

    for policy in ("sampling", "random"):
        assert loss(1, policy) == loss(1, policy)
        assert loss(1, policy) != loss(2, policy)


def test_a_language_model_generates_from_prompts(lm):
    found = commands.generate(lm[0], "--path", lm[1], *LM_SERVING, "--beam", 1, "--max-len-b", 6, "--prefix-size", 2)
    assert found.hypotheses()
