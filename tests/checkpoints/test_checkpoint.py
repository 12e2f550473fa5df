"""Any layout of checkpoint files gives one state with every expert under its global number."""

import commands
import pytest
import torch
from checkpoint_makers import LAYERS, assert_same_state, proving_state, split, whole
from fairseq import checkpoint_utils

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.find_files import find_checkpoint_files
from fairseq_moe_ext.serving import fairseq_hooks


@pytest.mark.parametrize("name", ["lm_top2", "lm_top2_ws2", "mt_plain", "mt_nllb_ws2"])
def test_every_way_to_name_a_sharded_checkpoint_means_the_same(shared_goldens, name):
    folder = shared_goldens / name
    states = [
        read_checkpoint(str(folder / f"checkpoint_last{part}.pt"))["model"] for part in ("", "-shared", "-rank-0")
    ]
    keys = [line.split("\t")[0] for line in (folder / "keys.txt").read_text().splitlines() if not line.startswith("##")]
    assert {key for key in keys if "expert" not in key} <= set(states[0])
    assert_same_state(states[1], states[0])
    assert_same_state(states[2], states[0])


def test_one_file_is_the_same_model_as_its_shards(shared_goldens):
    folder = shared_goldens / "mt_plain"
    merged = read_checkpoint(str(folder / "checkpoint_merged.pt"))
    sharded = read_checkpoint(str(folder / "checkpoint_last.pt"))
    assert_same_state(sharded["model"], merged["model"])
    assert vars(sharded["cfg"]["model"]) == vars(merged["cfg"]["model"])


@pytest.mark.parametrize("name", ["lm_top2_ws2", "mt_nllb_ws2"])
def test_experts_of_two_ranks_get_their_global_numbers(shared_goldens, name):
    folder = shared_goldens / name
    state = read_checkpoint(str(folder / "checkpoint_last.pt"))["model"]
    found = 0
    for rank in (0, 1):
        for key, tensor in commands.read_state(folder / f"checkpoint_last-rank-{rank}.pt")["model"].items():
            prefix, _, rest = key.partition(".experts.")
            local, _, rest = rest.partition(".")
            assert torch.equal(state[f"{prefix}.experts.{4 * rank + int(local)}.{rest}"], tensor)
            found += 1
    assert found == 2 * 4 * 4 * 2  # ranks, experts, tensors of an expert, layers
    assert sum(".experts." in key for key in state) == found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shards_cut_anew_give_the_same_state(shared_goldens, tmp_path, ranks):
    model = read_checkpoint(str(shared_goldens / "lm_top2_ws2" / "checkpoint_last.pt"))["model"]
    split(model, ranks, tmp_path)
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], model)


@pytest.mark.parametrize(("num_experts", "ranks"), [(8, 8), (12, 12), (128, 128), (24, 12), (512, 64), (6, 2), (1, 1)])
def test_rank_files_are_taken_in_numerical_order(tmp_path, num_experts, ranks):
    split(proving_state(num_experts), ranks, tmp_path)
    state = read_checkpoint(str(tmp_path / "X.pt"))["model"]
    assert_same_state(state, proving_state(num_experts))
    for layer in LAYERS:
        for expert in range(num_experts):
            bias = state[f"decoder.layers.{layer}.moe_layer.experts.{expert}.fc1.bias"]
            assert bias.tolist() == [100 * layer + expert] * 5


@pytest.mark.parametrize(("ranks", "replicas"), [(4, 2), (1, 3), (8, 2)])
def test_replicas_are_left_aside(tmp_path, ranks, replicas):
    split(proving_state(8), ranks, tmp_path, replicas=replicas)
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], proving_state(8))


def test_replicas_need_not_be_readable(tmp_path):
    files = split(proving_state(8), 2, tmp_path, replicas=2)
    files[2].write_bytes(b"")
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], proving_state(8))


def test_other_checkpoints_in_the_folder_are_left_alone(tmp_path):
    model = proving_state(4)
    split(model, 2, tmp_path, stem="checkpoint_1_500")
    split(proving_state(8), 4, tmp_path, stem="checkpoint_1_5000")
    split(proving_state(8), 4, tmp_path, stem="1_500")
    assert_same_state(read_checkpoint(str(tmp_path / "checkpoint_1_500.pt"))["model"], model)


def test_a_file_under_exactly_that_name_is_whole_though_shards_stand_beside_it(tmp_path):
    split(proving_state(8), 2, tmp_path)
    torch.save(whole(proving_state(4)), tmp_path / "X.pt")
    assert find_checkpoint_files(str(tmp_path / "X.pt")).whole == tmp_path / "X.pt"
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], proving_state(4))
    assert_same_state(read_checkpoint(str(tmp_path / "X-shared.pt"))["model"], proving_state(8))


def test_a_whole_checkpoint_may_have_any_name(tmp_path):
    torch.save(whole(proving_state(4)), tmp_path / "model.bin")
    assert_same_state(read_checkpoint(str(tmp_path / "model.bin"))["model"], proving_state(4))


def test_optimizer_states_are_dropped_and_the_rest_is_rank_0s(shared_goldens):
    folder = shared_goldens / "lm_top2_ws2"
    rank_0 = commands.read_state(folder / "checkpoint_last-rank-0.pt")
    assert "last_optimizer_state" in rank_0
    state = read_checkpoint(str(folder / "checkpoint_last.pt"))
    assert set(state) == set(rank_0) - {"last_optimizer_state"}
    assert state["cfg"] == rank_0["cfg"]
    assert state["extra_state"] == rank_0["extra_state"]


def test_old_names_are_translated(tmp_path):
    model = proving_state(2) | {"decoder.layers.0.alpha2": torch.full((3,), 7.0)}
    torch.save(whole(model), tmp_path / "X.pt")
    state = read_checkpoint(str(tmp_path / "X.pt"))["model"]
    assert state["decoder.layers.0.w_resid"].tolist() == [7.0, 7.0, 7.0]
    assert "decoder.layers.0.alpha2" not in state


def test_old_keys_of_sinusoidal_positions_do_no_harm(shared_goldens):
    folder = shared_goldens / "mt_nllb_ws2"
    path = folder / "checkpoint_last.pt"
    assert "encoder.embed_positions._float_tensor" in read_checkpoint(str(path))["model"]
    model, _ = commands.load("generate", folder / "data-bin", "--path", path, *commands.NLLB, "-t", "de")
    assert not [key for key in model.state_dict() if "_float_tensor" in key]


def test_embeddings_tied_in_the_checkpoint_are_tied_in_the_model(shared_goldens):
    folder = shared_goldens / "mt_nllb_ws2"
    path = folder / "checkpoint_last.pt"
    model, _ = commands.load("generate", folder / "data-bin", "--path", path, *commands.NLLB, "-t", "de")
    weight = model.encoder.embed_tokens.weight
    assert model.decoder.embed_tokens.weight is weight
    assert model.decoder.output_projection.weight is weight
    assert torch.equal(weight, read_checkpoint(str(path))["model"]["decoder.output_projection.weight"])


def test_the_served_model_has_the_checkpoints_tensors(shared_goldens):
    folder = shared_goldens / "lm_top2_ws2"
    path = folder / "checkpoint_last-rank-1.pt"
    model, _ = commands.load("eval_lm", folder / "data-bin", "--path", path, *commands.LM)
    wanted = read_checkpoint(str(path))["model"]
    assert_same_state(model.state_dict(), wanted, skip=[key for key in wanted if "_float_tensor" in key])


def test_training_still_reads_its_own_files(shared_goldens):
    fairseq_hooks.install()
    path = shared_goldens / "lm_top2_ws2" / "checkpoint_last-shared.pt"
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "last_optimizer_state" in state
    assert not [key for key in state["model"] if ".experts." in key]
    namespaced = checkpoint_utils.load_checkpoint_to_cpu(str(shared_goldens / "mt_plain" / "checkpoint_merged.pt"))
    assert namespaced["cfg"]["model"].arch == "transformer"


def test_installing_the_hooks_twice_changes_nothing():
    fairseq_hooks.install()
    load, find = checkpoint_utils.load_checkpoint_to_cpu, checkpoint_utils.get_maybe_sharded_checkpoint_filename
    fairseq_hooks.install()
    assert checkpoint_utils.load_checkpoint_to_cpu is load
    assert checkpoint_utils.get_maybe_sharded_checkpoint_filename is find
    assert not hasattr(load.moe_ext_original, "moe_ext_original")
