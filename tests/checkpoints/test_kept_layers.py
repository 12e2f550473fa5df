"""Kept layers (`--encoder-layers-to-keep`, `--decoder-layers-to-keep`): each stays what it was, MoE or dense.

The naive twin is the whole model, of whose layers those that are kept are put in a row by hand.
"""

from __future__ import annotations

import ast
import functools
import json
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import commands
import pytest
import torch
from checkpoint_makers import split
from data_makers import LM_TRAINING, MT_TRAINING, training_configuration, untrained_checkpoint, write_data
from fairseq import tasks
from model_makers import language_model, sentences, translation_input, translation_model
from ties import assert_same_generation

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.kept_layers import prune
from fairseq_moe_ext.checkpoints.plain_config import ConfigError
from fairseq_moe_ext.models.transformer_layer import MoETransformerDecoderLayer, MoETransformerEncoderLayer
from fairseq_moe_ext.nllb.export import export_hf

LAYERS = ("--encoder-layers", 6, "--decoder-layers", 6)
TRAINING = {
    "lm": (*LM_TRAINING, *LAYERS[2:]),
    "mt": (*MT_TRAINING, *LAYERS),
    "dense alternates": (*MT_TRAINING, *LAYERS, "--alternate-ffn-embed-dim", 24),
}
KEPT = {"lm": {"decoder": [1, 3, 4]}, "mt": {"encoder": [1, 3, 4], "decoder": [0, 5]}}
KEPT["dense alternates"] = KEPT["mt"]
MOE = {"lm": {"decoder": [0, 1]}, "mt": {"encoder": [0, 1], "decoder": [1]}}


def overrides(kept: dict[str, list[int]]) -> dict[str, str]:
    return {f"{side}_layers_to_keep": ",".join(map(str, numbers)) for side, numbers in kept.items()}


def set_fields(state: dict, fields: dict) -> None:
    of_model = state["cfg"]["model"]
    (vars(of_model) if isinstance(of_model, Namespace) else of_model).update(fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    for name, training in TRAINING.items():
        data = write_data(folder / name, () if name == "lm" else ("en", "de"), splits={"test": 2})
        untrained_checkpoint(folder / name / "whole.pt", data, *training)
        state = commands.read_state(folder / name / "whole.pt")
        split(state["model"], 2, folder / name, "parts", template=lambda part, state=state: {**state, "model": part})
        prune(state["model"], KEPT[name])
        set_fields(state, {f"{side}_layers": len(numbers) for side, numbers in KEPT[name].items()})
        torch.save(state, folder / name / "pruned.pt")
        set_fields(state, overrides(KEPT[name]))  # as a training from the beginning leaves it
        split(state["model"], 2, folder / name, "kept", template=lambda part, state=state: {**state, "model": part})
    return folder


@pytest.fixture
def served(folder):
    """Loads a model, which is served until the test ends."""
    with ExitStack() as stack:

        def load(name: str, file: str, **options):
            return stack.enter_context(moe.load(folder / name / file, cpu=True, **options))._parts.models[0]

        yield load


@torch.no_grad()
def output(model) -> torch.Tensor:
    if hasattr(model, "encoder"):
        return model(**translation_input())[0]
    return model(sentences())[0]


def by_hand(model, kept: dict[str, list[int]]):
    for side, numbers in kept.items():
        stack = getattr(model, side)
        stack.layers = torch.nn.ModuleList(stack.layers[number] for number in numbers)
        if side == "decoder":
            stack.num_layers = len(numbers)
    return model


@pytest.fixture(scope="module")
def twins(folder):
    """The output of the whole model of a name with its kept layers in a row."""

    @functools.cache
    def of_text(name: str, kept: str, gating: str) -> torch.Tensor:
        with moe.load(folder / name / "whole.pt", cpu=True, moe_gating=gating) as whole:
            return output(by_hand(whole._parts.models[0], ast.literal_eval(kept)))

    return lambda name, kept, gating="dynamic": of_text(name, repr(kept), gating)


def moe_layers(model) -> dict[str, list[int]]:
    kinds = MoETransformerEncoderLayer, MoETransformerDecoderLayer
    sides = [side for side in ("encoder", "decoder") if hasattr(model, side)]
    return {
        side: [number for number, layer in enumerate(getattr(model, side).layers) if isinstance(layer, kinds)]
        for side in sides
    }


STATIC, HOST = {"moe_gating": "static"}, {"expert_buffer_size": 2}
SERVED = [
    pytest.param("whole.pt", {}, marks=pytest.mark.slow),
    ("whole.pt", HOST),
    ("parts.pt", STATIC),
    ("parts.pt", {**HOST, "expert_store": "disk"}),
    ("pruned.pt", STATIC),
    ("pruned.pt", {**HOST, "expert_store": "disk"}),
    ("kept.pt", {}),
    pytest.param("kept.pt", HOST, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("file", "options"), SERVED, ids=str)
@pytest.mark.parametrize("name", ["lm", "mt"])
def test_kept_layers_are_what_they_were(served, twins, name, file, options):
    given = {} if file in ("pruned.pt", "kept.pt") else {"model_overrides": overrides(KEPT[name])}
    model = served(name, file, **options, **given)
    assert moe_layers(model) == MOE[name]
    torch.testing.assert_close(output(model), twins(name, KEPT[name], options.get("moe_gating", "dynamic")))


def test_nothing_is_said_of_the_other_side(served, twins):
    """fairseq's own pruning drops all layers of that side."""
    model = served("mt", "whole.pt", model_overrides={"encoder_layers_to_keep": "4,1"})
    assert moe_layers(model) == {"encoder": [0], "decoder": [1, 3, 5]}
    assert torch.equal(output(model), twins("mt", {"encoder": [1, 4]}))


@pytest.mark.parametrize("file", ["whole.pt", "pruned.pt"])
def test_dense_layers_of_another_size_stay_so(served, twins, file):
    """They stand in the encoder's MoE layers' place."""
    given = {"model_overrides": overrides(KEPT["mt"])} if file == "whole.pt" else {}
    model = served("dense alternates", file, **given)
    assert [layer.fc1.out_features for layer in model.encoder.layers] == [24, 24, 192]
    assert moe_layers(model)["decoder"] == [1]
    assert torch.equal(output(model), twins("dense alternates", KEPT["mt"]))


def test_kept_layers_of_a_pruned_checkpoint_are_its_own(served, twins):
    model = served("lm", "kept.pt", model_overrides={"decoder_layers_to_keep": "0,2"})
    assert torch.equal(output(model), twins("lm", {"decoder": [1, 4]}))


@pytest.mark.parametrize("kept", ["0,6", "1,1", "-1,2"])
def test_layers_that_are_not_there(served, kept):
    words = f"decoder_layers_to_keep must name layers of the state, .* of which the decoder has 0 to 5, .*{kept}"
    with pytest.raises(CheckpointError, match=words):
        served("lm", "whole.pt", model_overrides={"decoder_layers_to_keep": kept})


@pytest.mark.parametrize("kept", ["0,1,4", "1,3,4"])
def test_an_override_is_never_taken_for_what_has_been_done(served, kept):
    with pytest.raises(CheckpointError, match=f"of which the decoder has 0 to 2, got .*{kept}"):
        served("lm", "kept.pt", model_overrides={"decoder_layers_to_keep": kept})


@pytest.mark.slow
@pytest.mark.parametrize("file", ["whole.pt", "parts.pt", "kept.pt"])
def test_several_ranks_generate_as_one(folder, file):
    arguments = (folder / "mt", "--path", folder / "mt" / file, "--task", "moe_translation", "--cpu", "--beam", 2)
    arguments += ("--max-len-b", 8, "--num-workers", 0, "--expert-buffer-size", 2)
    if file != "kept.pt":
        arguments += ("--model-overrides", repr(overrides(KEPT["mt"])))
    done = [commands.run("generate", *arguments, ranks=ranks) for ranks in (None, 2)]
    one, two = (commands.Generation(each.stdout.splitlines()) for each in done)
    assert len(two.hypotheses()) == 2
    assert_same_generation(two, one, positions=1.1e-4)  # printed to 4 places


# --- training


@pytest.mark.parametrize("make", [language_model, translation_model])
def test_a_training_goes_on_from_whole_and_from_pruned_weights(make):
    """As fairseq's trainer restores them: pruned ones are what the same command saved."""
    kept = {side: [1, 3, 4] for side in (("decoder",) if make is language_model else ("encoder", "decoder"))}
    layers = {f"{side}_layers": 6 for side in kept}
    whole = make(**layers)
    state, twin = whole.state_dict(), by_hand(make(**layers).eval(), kept)
    for seed in (1, 2):
        model = make(seed, **layers, **overrides(kept))
        assert moe_layers(model) == dict.fromkeys(kept, [0, 1])
        of_model = Namespace(arch="moe_transformer", **overrides(kept))
        model.load_state_dict(state, strict=True, model_cfg=of_model)
        assert not any(vars(of_model)[field] for field in overrides(kept))  # fairseq's trainer saves them so
        assert torch.equal(output(model.eval()), output(twin))
        state = model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm", "mt"])
def test_a_pruned_training_is_resumed_and_served(folder, tmp_path, name):
    """From whole weights, then once more from what was saved, by the same flags."""
    data = write_data(tmp_path / "data", () if name == "lm" else ("en", "de"))
    common = (*TRAINING[name], "--optimizer", "adam", "--lr", "0.01", "--batch-size", 8, "--cpu", "--num-workers", 0)
    common += ("--save-dir", tmp_path, "--no-epoch-checkpoints", "--disable-validation")
    for side, numbers in KEPT[name].items():
        common += (f"--{side}-layers-to-keep", ",".join(map(str, numbers)))
    first = ("--finetune-from-model", folder / name / "whole.pt", "--max-update", 2)
    commands.run("train", data, *common, *first)
    second = commands.run("train", data, *common, "--max-update", 4)
    assert "Loaded checkpoint" in second.stdout
    state = commands.read_state(tmp_path / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 4
    with moe.load(tmp_path / "checkpoint_last.pt", data, cpu=True) as served:
        assert moe_layers(served._parts.models[0]) == MOE[name]


@pytest.mark.parametrize("make", [language_model, translation_model])
def test_a_training_without_the_flags_of_a_pruned_model_is_told_which(make):
    """Kept layers stand where no --moe-freq puts them."""
    state = make(decoder_layers=6, decoder_layers_to_keep="1,3,4").state_dict()
    words = (
        r"the decoder's MoE layers must stand where the training's flags put them, at \[1\], and are at \[0, 1\] in "
        "the checkpoint: .* --decoder-layers and --decoder-layers-to-keep must be as when it was pruned"
    )
    with pytest.raises(ConfigError, match=words):
        make(decoder_layers=3).load_state_dict(state, strict=True, model_cfg=Namespace(arch="moe_transformer"))


def test_the_flags_of_a_translation_model_are_read(folder):
    """fairseq's parser makes a list of them, of which its model builder asks a text."""
    flags = ("--encoder-layers-to-keep", "4,1,3", "--decoder-layers-to-keep", "0")
    cfg = training_configuration(folder / "mt", *TRAINING["mt"], *flags)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    assert moe_layers(model) == {"encoder": [0, 1], "decoder": []}


def test_a_language_models_saved_arguments_count_its_layers(folder):
    state = training_configuration(folder / "lm", *TRAINING["lm"], "--decoder-layers-to-keep", "1,3,4")
    tasks.setup_task(state.task).build_model(state.model)
    assert state.model.decoder_layers == 3


# --- Hugging Face's layout


@pytest.fixture(scope="module")
def nllb(tmp_path_factory) -> Path:
    """6 + 6 layers as NLLB has them, MoE layers at 1, 3 and 5."""
    folder = tmp_path_factory.mktemp("nllb")
    data = write_data(folder, ("en", "de"), splits={"test": 2})
    fields = ("--encoder-normalize-before", "--decoder-normalize-before", "--share-all-embeddings")
    untrained_checkpoint(folder / "whole.pt", data, *TRAINING["mt"], *fields)
    return folder


@pytest.mark.parametrize(("kept", "step"), [([0, 1, 2, 3], 2), ([1, 3], 1), ([0, 2, 3], 3), ([0, 2], 0)])
def test_pruned_checkpoints_are_exported_with_their_own_step(nllb, tmp_path, kept, step):
    save_pruned(nllb, tmp_path, kept)
    export_hf(str(tmp_path / "X.pt"), str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["encoder_sparse_step"] == step


@pytest.mark.parametrize(("kept", "found"), [([1, 3, 4], r"\[0, 1\]"), ([0, 1, 3], r"\[1, 2\]")])
def test_irregular_places_have_no_step(nllb, tmp_path, kept, found):
    save_pruned(nllb, tmp_path, kept)
    with pytest.raises(CheckpointError, match=f"the encoder's MoE layers must stand at every n-th .*{found}"):
        export_hf(str(tmp_path / "X.pt"), str(tmp_path / "hf"))


def save_pruned(nllb: Path, folder: Path, kept: list[int]) -> None:
    """The encoder's layers; the fields as a training from the beginning leaves them."""
    state = commands.read_state(nllb / "whole.pt")
    prune(state["model"], {"encoder": kept})
    set_fields(state, {"encoder_layers": len(kept), **overrides({"encoder": kept})})
    torch.save(state, folder / "X.pt")
