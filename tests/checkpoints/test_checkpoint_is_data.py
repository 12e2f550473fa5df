"""Nothing in a checkpoint's configuration is evaluated, resolved, imported or opened, whatever stands in it."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from pathlib import Path

import commands
import pytest
import torch
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data
from fairseq import checkpoint_utils, tasks
from omegaconf import OmegaConf

from fairseq_moe_ext.checkpoints.errors import CheckpointError

SMALL = ("--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 16, "--decoder-layers", 2)
BOTH = (*SMALL, "--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 16, "--encoder-layers", 2)
TRAINING = {
    "moe lm": (*LM_TRAINING, *SMALL),
    "dense lm": ("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16", *SMALL),
    "moe mt": (*MT_TRAINING, *BOTH),
    "dense mt": ("--task", "translation", "--arch", "transformer", "-s", "en", "-t", "de", *BOTH),
}
EVERY = list(TRAINING)


class Served:
    """Untrained checkpoints of four kinds; any of them changed and loaded as fairseq's commands load it."""

    def __init__(self, folder: Path):
        self.folder, self.states, self.tasks = folder, {}, {}
        data = {"lm": write_data(folder / "lm"), "mt": write_data(folder / "mt", ("en", "de"))}
        for name, training in TRAINING.items():
            side = name.split()[1]
            untrained_checkpoint(folder / "X.pt", data[side], *training)
            self.states[name] = commands.read_state(folder / "X.pt")
            arguments = commands.LM[:-1] if side == "lm" else (*commands.MT, "-s", "en", "-t", "de")
            if side == "lm":
                arguments = ("--task", "moe_language_modeling", "--tokens-per-sample", "16", "--cpu")
            command = "eval_lm" if side == "lm" else "generate"
            cfg = commands.parse(command, data[side], "--path", folder / "X.pt", *arguments)
            self.tasks[name] = tasks.setup_task(cfg.task)

    def model(self, name: str, fields: dict, as_args: bool = False) -> dict:
        """The state of `name` with other `fields` of its model, in `args` where older checkpoints have them."""
        state = self.states[name]
        model = state["cfg"]["model"]
        model = {**(vars(model) if isinstance(model, Namespace) else model), **fields}
        if as_args:
            task = state["cfg"]["task"]
            task = vars(task) if isinstance(task, Namespace) else task
            args = Namespace()
            vars(args).update({**task, **model, "arch": model["_name"], "task": task["_name"]})
            return {**state, "args": args, "cfg": None}
        return {**state, "cfg": {**state["cfg"], "model": model}}

    def load(self, name: str, state: dict, overrides: dict | None = None):
        torch.save(state, self.folder / "X.pt")
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
            [str(self.folder / "X.pt")], arg_overrides=overrides or {}, task=self.tasks[name]
        )
        return models[0]

    def refused(self, name: str, state: dict, *words: str, overrides: dict | None = None, error=CheckpointError):
        with pytest.raises(error) as caught:
            self.load(name, state, overrides)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 600, message
        for word in words:
            assert word in message, message


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


@pytest.fixture
def code(tmp_path):
    """A string that makes a folder where it is evaluated; the test fails where that happened."""
    marker = tmp_path / "it ran"
    yield f"__import__('os').mkdir({str(marker)!r})"
    assert not marker.exists()


EVALUATED = {
    "adaptive_softmax_cutoff": EVERY,
    "adaptive_input_cutoff": ["dense lm"],
    "character_filters": ["dense lm"],
    "decoder_xformers_att_config": EVERY,
    "encoder_xformers_att_config": ["moe mt", "dense mt"],
    "xformers_att_config": EVERY,
}
NEEDED = {
    "adaptive_input_cutoff": {"adaptive_input": True, "adaptive_softmax_cutoff": "10,20"},
    "character_filters": {"character_embeddings": True},
}


@pytest.mark.parametrize(("field", "name"), [(field, name) for field, names in EVALUATED.items() for name in names])
@pytest.mark.parametrize("where", ["cfg", "args", "overrides"])
def test_no_string_is_evaluated(served, code, field, name, where):
    fields = {**NEEDED.get(field, {}), field: code}
    if where == "overrides":
        served.refused(name, served.model(name, {}), field, overrides=fields)
    else:
        served.refused(name, served.model(name, fields, as_args=where == "args"), field)


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("moe lm", "moe_second_expert_policy", "best", "second_expert_policy must be one of all, sampling, random"),
        ("moe lm", "moe_eom", 1.5, "moe_eom"),
        ("moe lm", "moe_eval_capacity_token_fraction", float("nan"), "must be a finite number"),
        ("moe lm", "adaptive_softmax_cutoff", "10,20", "no longer supported"),
        ("moe mt", "alibi", True, "checkpoint field alibi"),
        ("dense mt", "alibi", True, "checkpoint field alibi"),
    ],
)
def test_a_field_that_cannot_be_served_is_of_a_file(served, name, field, value, words):
    state = served.model(name, {field: value})
    served.refused(name, state, f"{served.folder}/X.pt: ", words, error=(CheckpointError, ValueError))


@pytest.mark.parametrize("name", ["moe mt", "dense mt"])
@pytest.mark.parametrize("group", ["encoder", "decoder"])
def test_no_string_is_evaluated_in_a_nested_group(served, code, name, group):
    served.refused(name, served.model(name, {group: {"xformers_att_config": code}}), f"{group}_xformers_att_config")


@pytest.mark.parametrize("name", ["moe mt", "dense mt"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_no_path_is_opened(served, tmp_path, name, side):
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    field = f"{side}_embed_path"
    state = served.model(name, {"share_all_embeddings": False, field: str(tmp_path / "fifo")})
    served.refused(name, state, field, "must be unset")


def test_a_path_of_the_training_can_be_overridden(served):
    state = served.model("moe mt", {"encoder_embed_path": "/data/embeddings.txt"})
    served.load("moe mt", state, {"encoder_embed_path": None})


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("field", ["decoder_layers", "dropout", "activation_fn", "share_decoder_input_output_embed"])
def test_an_interpolation_is_not_resolved(served, name, field):
    seen = []
    OmegaConf.register_new_resolver("told", lambda: seen.append(1), replace=True)
    try:
        served.refused(name, served.model(name, {field: "${" * 50}), field)
        for text in ("${oc.env:HOME}", "${told:}", "${model.dropout}"):
            served.refused(name, served.model(name, {field: text}), field, text[:20])
            served.refused(name, served.model(name, {field: text}, as_args=True), field)
            node = served.model(name, {field: text})
            node["cfg"]["model"] = OmegaConf.create(node["cfg"]["model"])
            served.refused(name, node, field)
    finally:
        OmegaConf.clear_resolver("told")
    assert not seen


@pytest.mark.parametrize("name", EVERY)
def test_interpolations_elsewhere_stay_where_they_are(served, name):
    """Doubled 60 times, they would fill any memory."""
    doubled = {f"a{number}": f"${{common.a{number + 1}}}" * 2 for number in range(60)}
    state = served.model(name, {"_target_": "os.system", "__class__": "x", "keys": 1, "save_dir": "${oc.env:HOME}/x"})
    state["cfg"]["common"] = OmegaConf.create({**doubled, "a60": "x", "user_dir": "/tmp", "keys": "${common.a0}"})
    state["cfg"]["checkpoint"] = {"finetune_from_model": "/etc/passwd", 3: None}
    served.load(name, state)


def test_fairseqs_own_interpolations_count_as_unset(served):
    """A Namespace of arguments keeps them where the command line said nothing."""
    fields = {"moe_gating": "${task.moe_gating}", "batch_size": "${dataset.batch_size}", "tpu": "${common.tpu}"}
    served.load("moe lm", served.model("moe lm", fields))
    fields = {"decoder_input_dim": "${model.decoder.embed_dim}", "decoder_output_dim": "${model.decoder.embed_dim}"}
    served.load("moe mt", served.model("moe mt", fields))


@pytest.mark.parametrize(
    ("arch", "name"),
    [("lightconv", "dense mt"), ("transformer_from_pretrained_xlm", "dense mt"), ("fconv_lm", "dense lm")],
)
def test_a_dense_checkpoint_of_another_family_is_refused_by_name(served, code, arch, name):
    fields = {"_name": arch, "arch": arch, "decoder_layers_list": code, "encoder_attention": code}
    served.refused(name, served.model(name, fields), arch, "families transformer or transformer_lm", error=ValueError)


@pytest.mark.parametrize("as_args", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_honest_values_in_other_types(served, name, as_args):
    side = ("decoder", "encoder") if "mt" in name else ("decoder",)
    fields = {"dropout": 0, "attention_dropout": "0.1", f"{side[-1]}_layers": 2.0}
    fields |= {"adaptive_softmax_dropout": 0, "decoder_attention_heads": "4", "quant_noise_pq": 0}
    fields |= {"no_scale_embedding": 0, "langs": ["en"] * 200, "langtoks": {"main": ("src", None)}, "betas": "(0, 1)"}
    fields |= {"data": "/data/bin", "character_filters": "[(1, 64), (2, 128)]", "sampling_weights": {"a": 1.0}}
    served.load(name, served.model(name, fields, as_args=as_args))


def test_cutoffs_are_served_as_the_list_that_they_say(served):
    training = ("--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "10,20", *TRAINING["dense lm"])
    saved = untrained_checkpoint(served.folder / "Y.pt", served.folder / "lm", *training)
    found = served.load("dense lm", commands.read_state(served.folder / "Y.pt"))
    assert found.decoder.adaptive_softmax.cutoff == saved.decoder.adaptive_softmax.cutoff == [10, 20, 40]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("decoder_layers", value) for value in (10**7, 10**12, 3, "1" * 900)),
        *(("decoder_ffn_embed_dim", value) for value in (10**9, 17)),
        ("decoder_embed_dim", 10**9),
        *(("max_target_positions", value) for value in (10**12, 1e15)),
        ("decoder_layers_to_keep", ",".join(map(str, range(90)))),
        ("base_layers", 10**7),
        ("decoder_attention_heads", 3),
        ("decoder_attention_heads", 0),
        ("decoder_ffn_embed_dim", -5),
        ("decoder_output_dim", 10**9),
        ("adaptive_softmax_cutoff", "5,1000000000"),
        *(("max_target_positions", value) for value in (-1, 0, True)),
        *(("decoder_attention_heads", value) for value in (-1, True, 10**9)),
        *(("dropout", value) for value in (float("nan"), -0.5, 1e300, True, "1e999")),
        ("decoder_layerdrop", float("inf")),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_model_that_the_tensors_do_not_fill(served, name, field, value):
    served.refused(name, served.model(name, {field: value}), error=(CheckpointError, ValueError))


@pytest.mark.parametrize("name", EVERY)
def test_tensors_that_no_module_takes(served, name):
    """Also of the dense models, which are fairseq's own."""
    state = served.model(name, {})
    weight = "decoder.layers.0.fc1.weight"
    for model, words in (
        ({**state["model"], "foo.bar": torch.ones(3)}, 'Unexpected key(s) in state_dict: "foo.bar"'),
        ({**state["model"], weight: torch.ones(1, 1)}, f"size mismatch for {weight}"),
        ({key: tensor for key, tensor in state["model"].items() if key != weight}, "must fit the model"),
        ({**state["model"], weight: state["model"][weight] + 1j}, f"real numbers, {weight} is torch.complex64"),
    ):
        served.refused(name, {**state, "model": model}, f"{served.folder}/X.pt: its tensors must", words)


@pytest.mark.parametrize("name", EVERY)
def test_a_damaged_weight_names_its_file(served, name, monkeypatch):
    state = served.model(name, {})
    weight = torch.full((16, 16), 101.0)
    torch.save({**state, "model": {**state["model"], "decoder.layers.0.fc1.weight": weight}}, served.folder / "X.pt")
    data = bytearray((served.folder / "X.pt").read_bytes())
    data[data.index(weight.numpy().tobytes())] ^= 1
    monkeypatch.setattr(torch, "save", lambda _, file: file.write_bytes(data))
    served.refused(name, state, f"{served.folder}/X.pt: record", "is damaged")


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize(("side", "other"), [("lm", "mt"), ("mt", "lm")])
def test_a_checkpoint_under_a_task_of_another_kind(served, kind, side, other, monkeypatch):
    monkeypatch.setitem(served.tasks, f"{kind} {side}", served.tasks[f"{kind} {other}"])
    state = served.model(f"{kind} {side}", {})
    served.refused(f"{kind} {side}", state, "--task does not fit the checkpoint", error=ValueError)


def test_a_field_that_fairseq_calls_by_its_flag_is_of_a_file(served):
    state = served.model("moe mt", {"share_all_embeddings": True, "encoder_embed_dim": 8})
    served.refused("moe mt", state, f"{served.folder}/X.pt: --share-all-embeddings", error=ValueError)
    state = served.model("moe lm", {"scalar": 0.5})
    served.refused("moe lm", state, f"{served.folder}/X.pt: --quant-noise-scalar", error=ValueError)


def test_norms_that_the_release_did_not_train_are_not_served(served):
    """It takes their flags and builds no module for them, unless its model is described by a Namespace."""
    fields = dict.fromkeys(("scale_attn", "scale_fc", "scale_heads", "scale_resids"), True)
    for name in ("dense lm", "moe lm"):
        served.load(name, served.model(name, fields))
    training = ("--scale-attn", "--scale-fc", "--scale-heads", "--scale-resids", *TRAINING["moe lm"])
    untrained_checkpoint(served.folder / "Y.pt", served.folder / "lm", *training)
    found = served.load("moe lm", commands.read_state(served.folder / "Y.pt"))
    assert "decoder.layers.0.w_resid" in found.state_dict()


def test_positions_and_layers_of_the_embedder_have_bounds(served):
    learned = {"decoder_learned_pos": True, "max_target_positions": 999_999}
    served.refused("dense lm", served.model("dense lm", learned), "must fit the model")
    embedder = {"character_embeddings": True, "char_embedder_highway_layers": 10**7}
    served.refused("dense lm", served.model("dense lm", embedder), "char_embedder_highway_layers")


def test_experts_that_a_gate_alone_claims(served):
    state = served.model("moe lm", {"moe_expert_count": 4_000})
    gates = {key: torch.zeros(4_000, 16) for key in state["model"] if key.endswith("gate.wg.weight")}
    served.refused("moe lm", {**state, "model": {**state["model"], **gates}}, "must fit the model")


def test_other_parts_of_the_file_reach_nothing(served, caplog):
    state = served.model("moe lm", {})
    state["optimizer_history"] = [{"num_updates": "${oc.env:HOME}", "optimizer": {"x": 1}}, None]
    state |= {"task_state": {"dictionary": 3, "load_state_dict": 1}, "extra_state": 5, "criterion": [1]}
    with caplog.at_level(logging.INFO):
        served.load("moe lm", state)
    assert os.environ["HOME"] not in caplog.text
