"""`--expert-placement` of one process: one that fits changes nothing, any other is refused before weights come."""

import commands
import pytest
import torch
from small_lm import served_state, small_lm

from fairseq_moe_ext.balancing.placement import Placement, save_placement

LAYER, FOREIGN = "decoder.layers.1.moe_layer", "decoder.layers.7.moe_layer"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """(data, checkpoint, the placement that fits: per layer the ranks of every expert)."""
    folder = tmp_path_factory.mktemp("lm")
    data, content = small_lm(folder)
    gates = [key.removesuffix(".gate.wg.weight") for key in content["model"] if key.endswith(".gate.wg.weight")]
    assert LAYER in gates
    return data, folder / "X.pt", {name: ((0,),) * 8 for name in gates}


def load(lm, file):
    return commands.load("eval_lm", lm[0], "--path", lm[1], *commands.LM, "--expert-placement", file)[0]


def test_a_placement_on_one_rank_changes_nothing(lm, tmp_path):
    save_placement(tmp_path / "placement.json", Placement(1, lm[2]))
    found, wanted = load(lm, tmp_path / "placement.json").state_dict(), served_state(*lm[:2])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("world_size", "change", "words"),
    [
        (2, {}, "placement.json must be for the ranks that serve, 1, got 2"),
        (1, {LAYER: ((0,),) * 7}, f"must place the 8 experts of {LAYER}, got 7"),
        (1, {LAYER: ((0,),) * 9}, f"must place the 8 experts of {LAYER}, got 9"),
        (1, {FOREIGN: ((0,),) * 8}, f"it has {FOREIGN}, which the model lacks"),
        (1, {LAYER: None, FOREIGN: ((0,),) * 8}, f"it lacks {LAYER}"),
    ],
)
def test_a_placement_for_another_model_or_other_ranks(lm, tmp_path, world_size, change, words):
    layers = {name: layer for name, layer in {**lm[2], **change}.items() if layer}
    save_placement(tmp_path / "placement.json", Placement(world_size, layers))
    with pytest.raises(ValueError, match=f"--expert-placement.*{words}"):
        load(lm, tmp_path / "placement.json")


@pytest.mark.parametrize("content", ["", "{", '{"world_size": 1, "layers": {"a": [[]]}}'])
def test_a_malformed_placement(lm, tmp_path, content):
    (tmp_path / "placement.json").write_text(content)
    with pytest.raises(ValueError, match=f"--expert-placement {tmp_path / 'placement.json'}: "):
        load(lm, tmp_path / "placement.json")
