"""A model's bytes in every format, what a step reads of them, and what is chosen for a memory."""

from __future__ import annotations

import re

import commands
import hf_makers
import pytest
import torch
from torch import nn

from fairseq_moe_ext.command_line import plan as plan_command
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.serving.memory_plan import Workload, read_sizes
from fairseq_moe_ext.serving.memory_sizes import MEMORIES, choose

GB, GIB = 10**9, 2**30
ONE_SENTENCE = Workload(batch=1, length=30)


@pytest.fixture(scope="module")
def nllb():
    return read_sizes("moe_transformer_nllb_54b")


# GB that a decode step at beam 4 reads, as counted by hand: 47, 303 and 665 experts, and 1.73 billion dense weights
BY_HAND = {
    ("float", False): (6.6, 23.8, 48.1),
    ("int4", False): (4.3, 8.9, 15.3),
    ("int4", True): (2.6, 7.2, 13.6),
}


@pytest.mark.parametrize("weights, int8_dense", BY_HAND)
def test_a_step_of_nllb_reads_what_was_counted_by_hand(nllb, weights, int8_dense):
    expert = nllb.expert_bytes(weights, 2)
    for sentences, wanted in zip((1, 8, 32), BY_HAND[weights, int8_dense], strict=True):
        found = nllb.decoder.bytes(4 * sentences, nllb.choices, expert, 2, int8_dense)
        assert found / 1e9 == pytest.approx(wanted, rel=0.02)


def called_weights(module: nn.Module, run) -> int:
    """Elements of the parameters of all modules that `run` calls, but experts and embeddings; tied ones once."""
    seen: dict[int, int] = {}

    def note(part, _inputs):
        if not isinstance(part, nn.Embedding):
            seen.update({id(each): each.numel() for each in part.parameters(recurse=False)})

    experts = {part for layer in module.modules() if isinstance(layer, MOELayer) for part in layer.experts.modules()}
    hooks = [part.register_forward_pre_hook(note) for part in module.modules() if part not in experts]
    run()
    for hook in hooks:
        hook.remove()
    return sum(seen.values())


def test_the_dense_reads_are_the_weights_that_a_served_model_calls(shared_goldens):
    golden = shared_goldens / "mt_nllb_ws2"
    sizes = read_sizes(str(golden / "checkpoint_last.pt"))
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_last.pt", *commands.NLLB, "-t", "de")
    model, _ = commands.load("generate", *arguments)
    source, state = torch.tensor([[5, 6, 7, 2]]), {}
    target = torch.tensor([[2, 5, 6]])
    with torch.no_grad():
        encoded = model.encoder(source, torch.tensor([4]))
        model.decoder(target[:, :1], encoder_out=encoded, incremental_state=state)
        step = called_weights(model, lambda: model.decoder(target[:, :2], encoder_out=encoded, incremental_state=state))
    # keys and values of the encoder's output stay in the state, although their layers lie in the decoder
    assert sizes.decoder.dense.elements == step
    dense = sum(each.numel() for name, each in model.encoder.named_parameters() if ".experts." not in name)
    assert sizes.encoder.dense.elements == dense - model.encoder.embed_tokens.weight.numel()
    assert sizes.encoder.moe_layers + sizes.decoder.moe_layers == len(model.moe_layers())


def test_experts_touched_are_those_of_uniform_draws(nllb):
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(128, (4000, 6, 8), generator=generator)  # runs, layers, 4 rows of 2 choices
    mean = sum(len(layer.unique()) for run in draws for layer in run) / len(draws)
    assert nllb.decoder.experts_touched(rows=4, choices=2) == pytest.approx(mean, rel=0.01)


def test_a_model_of_one_choice_and_one_without_an_encoder(shared_goldens):
    sizes = read_sizes(str(shared_goldens / "lm_top1" / "checkpoint_last.pt"))
    assert sizes.choices == 1 and sizes.encoder is None and sizes.decoder.moe_layers == sizes.moe_layers
    assert read_sizes(str(shared_goldens / "lm_top2" / "checkpoint_last.pt")).choices == 2


def test_what_is_chosen_is_the_least_lossy_that_fits(nllb):
    for on_gpu in (False, True):
        chosen = [choose(nllb, memory * GIB, on_gpu, ONE_SENTENCE) for memory in (*MEMORIES, 512)]
        names = [each.weights.partition(",")[0] for each in chosen]
        assert names == ["int4", "int4", "int4", "int4", "int8", "float"]
        for memory, each in zip((*MEMORIES, 512), chosen, strict=True):
            taken = each.setting.device if on_gpu else each.setting.host
            assert taken <= memory * GIB and each.setting.flags.startswith("--cpu") != on_gpu
    assert choose(nllb, 3 * GIB, True, ONE_SENTENCE).setting is None


def test_on_24_gib_the_decoders_experts_stay_and_the_encoders_are_buffered(nllb):
    flags = choose(nllb, 24 * GIB, False, ONE_SENTENCE).setting.flags
    (places,) = map(int, re.findall(r"--expert-buffer-scope encoder --expert-buffer-size (\d+) ", flags))
    expert = nllb.expert_bytes("int4", 4)
    dense, decoder = nllb.dense_bytes(4, int8=True), 6 * 128 * expert
    assert dense + decoder + 6 * places * expert < 24 * GIB * 0.95 - 2 * GB
    assert dense + decoder + 6 * (places + 4) * expert > 24 * GIB * 0.95 - 2 * GB - GB
    # where only few of the encoder's would have room, all layers share it
    assert "--expert-buffer-scope" not in choose(nllb, 16 * GIB, False, ONE_SENTENCE).setting.flags


def test_a_dense_model_fits_or_not(tmp_path):
    hf_makers.write_model(tmp_path / "hf", hf_makers.DENSE)
    sizes = read_sizes(str(tmp_path / "hf"))
    assert choose(sizes, 16 * GIB, True, ONE_SENTENCE).weights == "float, all of it"
    assert choose(sizes, 1 * GIB, True, ONE_SENTENCE).setting is None


def test_the_command_shows_formats_and_memories(capsys, shared_goldens):
    assert plan_command.main(["moe_transformer_nllb_54b", "--batch-size", "1", "--length", "30"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if line[:1] == "|"}
    assert [float(each) for each in rows["int4, dense int8"]][1:4] == [25.62, 2.84, 28.46]
    assert len([name for name in rows if "GiB, RAM" in name]) == len([name for name in rows if "a GPU" in name]) == 5
    assert plan_command.main([str(shared_goldens / "mt_nllb_ws2" / "checkpoint_last.pt")]) == 0
    assert "weights, MiB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan_command.main(["moe_transformer_nllb_54b", "--moe-weights", "int4"])
    assert "--moe-weights needs --device-memory" in capsys.readouterr().err
