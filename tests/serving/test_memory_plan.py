"""What serving takes: counted from shapes, the same for a checkpoint, a folder and an architecture."""

from __future__ import annotations

from argparse import Namespace

import commands
import hf_makers
import pytest
import torch

from fairseq_moe_ext.byte_sizes import parse_bytes
from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.command_line import plan as plan_command
from fairseq_moe_ext.command_line.parsing import byte_size
from fairseq_moe_ext.experts.formats import format_named
from fairseq_moe_ext.models.int8_dense import bytes_in_int8
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.serving.memory_plan import (
    PROCESS,
    ModelSizes,
    Setting,
    Workload,
    plan,
    read_sizes,
    shapes_of_architecture,
    table,
)

GB = 10**9
NLLB = ModelSizes(
    dense=2_945_232_898,
    expert=33_564_672,
    moe_layers=12,
    experts=128,
    decoder_layers=24,
    model_dim=2048,
    vocabulary=256206,
)


def by_name(settings, name):
    return next(setting for setting in settings if name in setting.name)


def test_a_checkpoint_and_its_folder_have_the_same_sizes(tmp_path):
    hf_makers.write_model(tmp_path / "hf")
    convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"))
    sizes = read_sizes(str(tmp_path / "x.pt"))
    found = summarize(str(tmp_path / "x.pt"))
    assert sizes.parameters == found.parameters
    assert sizes.expert * sizes.experts * sizes.moe_layers * 4 == found.expert_bytes
    folder = read_sizes(str(tmp_path / "hf"))
    assert folder.parameters == sizes.parameters - 2  # fairseq's two versions
    assert (folder.experts, folder.moe_layers, folder.decoder_layers) == (8, 4, 4)


def test_sizes_of_nllb_54b():
    sizes = read_sizes("moe_transformer_nllb_54b")
    assert sizes.parameters == pytest.approx(54.5e9, rel=1e-3)
    assert (sizes.experts, sizes.moe_layers, sizes.vocabulary) == (128, 12, 256206)
    assert sizes.expert == 2 * 2048 * 8192 + 2048 + 8192
    assert sizes == NLLB


def test_a_dense_model_has_one_setting(tmp_path):
    hf_makers.write_model(tmp_path / "hf", hf_makers.DENSE)
    assert len(plan(read_sizes(str(tmp_path / "hf")), 24 * GB)) == 1


def test_what_fits_stays_within_the_device():
    for device in (8, 16, 24, 40, 80, 160):
        for setting in plan(NLLB, device * GB):
            assert not setting.fits or setting.device <= device * GB
            assert setting.fits == (not setting.why)
    assert by_name(plan(NLLB, 160 * GB), "all experts").fits
    assert not by_name(plan(NLLB, 80 * GB), "all experts").fits
    assert not by_name(plan(NLLB, 8 * GB), "experts in RAM").fits


def test_the_buffer_is_as_large_as_fits():
    """One more place of every layer would be too much."""
    setting = by_name(plan(NLLB, 24 * GB), "experts in RAM")
    assert setting.device <= 0.95 * 24 * GB < setting.device + 2 * NLLB.expert * NLLB.moe_layers
    assert "--expert-buffer-size 14" in setting.flags


def test_plan_stays_within_main_memory():
    settings = plan(NLLB, 24 * GB, host=64 * GB)
    assert not by_name(settings, "experts in RAM").fits
    assert by_name(settings, "disk and some RAM").fits
    assert by_name(settings, "CPU, buffer").host <= 64 * GB
    assert not by_name(plan(NLLB, 24 * GB, host=8 * GB), "CPU, buffer").fits
    assert not by_name(settings, "CPU, all experts").fits
    assert by_name(plan(NLLB, 24 * GB, host=256 * GB), "CPU, all experts").fits


def test_what_does_not_fit_says_why():
    settings = plan(NLLB, 8 * GB, host=64 * GB)
    too_much = "more than 95% of the GPU's 7.5 GiB"
    assert by_name(settings, "disk and some RAM").why == too_much
    assert by_name(settings, "experts in RAM").why == f"{too_much}, more than 59.6 GiB of RAM"
    assert f"| no: {too_much} " in table(settings)


def test_weights_pass_through_main_memory():
    """Also the dense ones, and those that end on a GPU; under torchrun every rank's."""
    dense, experts = NLLB.dense * 2, NLLB.expert * NLLB.moe_layers * NLLB.experts * 2
    settings = plan(NLLB, 24 * GB)
    for name in ("all experts", "experts in RAM"):
        assert by_name(settings, name).host == dense + experts + PROCESS
    assert by_name(settings, "disk and some RAM").host == dense + experts // 2 + PROCESS
    (ranks,) = (int(setting.name.split()[0]) for setting in settings if "torchrun" in setting.name)
    assert by_name(settings, "torchrun").host >= ranks * (dense + PROCESS) + experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_disk_holds_the_files_own_dtype(tmp_path, dtype):
    hf_makers.write_model(tmp_path / "hf")
    convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"), dtype=dtype)
    found = summarize(str(tmp_path / "x.pt")).bytes
    for work in (Workload(element=2), Workload(element=4)):
        assert {each.disk for each in plan(read_sizes(str(tmp_path / "x.pt")), 24 * GB, work=work)} == {found}
    folder = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert read_sizes(str(tmp_path / "hf")).file_bytes == pytest.approx(folder, rel=0.2)


def test_untied_embeddings_count_each(tmp_path):
    """In an architecture, and in a file where their shapes are the same; tied ones are one, however they are stored."""
    tied = shapes_of_architecture("moe_transformer_tiny", 1000, share_all_embeddings=True)
    untied = shapes_of_architecture("moe_transformer_tiny", 1000, share_all_embeddings=False)
    sizes, larger = ModelSizes.of_shapes(tied), ModelSizes.of_shapes(untied)
    assert larger.dense == sizes.dense + 2 * 1000 * sizes.model_dim and larger.vocabulary == 1000
    one, other = torch.rand(5, 4), torch.rand(5, 4)
    keys = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
    for tensors, dense in (([one] * 3, 20), ([one, one.clone(), one], 20), ([one, other, other], 40)):
        torch.save({"args": Namespace(), "model": dict(zip(keys, tensors, strict=True))}, tmp_path / "x.pt")
        assert read_sizes(str(tmp_path / "x.pt")).dense == dense


def test_a_larger_batch_needs_more():
    small, large = (by_name(plan(NLLB, 24 * GB, work=Workload(batch=batch)), "GPUs").device for batch in (1, 16))
    assert small < large


def test_the_script_prints_a_table(tmp_path, capsys):
    hf_makers.write_model(tmp_path / "hf")
    assert plan_command.main([str(tmp_path / "hf"), "--device-memory", "24GiB"]) == 0
    printed = capsys.readouterr().out
    assert "4 MoE layers of 8 experts" in printed and printed.count("\n|") == 9
    assert plan_command.main([str(tmp_path / "nothing.pt"), "--device-memory", "24G"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert byte_size("1.5GB") == 3 << 29
    with pytest.raises(SystemExit):
        plan_command.main(["x", "--device-memory", "much"])


def test_the_table_speaks_in_the_unit_of_the_flags():
    (row,) = [line for line in table([Setting("all", 24 * 2**30, 0, 3 << 29, True, "")]).splitlines() if "all" in line]
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["24.0 GiB", "", "1.5 GiB"]
    assert parse_bytes("24.0 GiB") == 24 * 2**30


@pytest.mark.parametrize("weights, gib", [("int8", 49.6), ("int4", 25.6)])
def test_quantised_experts_are_counted_by_their_blocks(weights, gib):
    sizes = read_sizes("moe_transformer_nllb_54b")
    block = format_named(weights, 2048, 8192).expert_bytes(torch.float16)
    assert 12 * 128 * block == pytest.approx(gib * 2**30, rel=2e-3)
    settings, floats = plan(sizes, 80 * GB, weights=weights), plan(sizes, 80 * GB)
    floats_by_name = {each.name.lstrip("0123456789"): each for each in floats}
    for setting in settings:
        if setting.name.lstrip("0123456789") not in floats_by_name:
            assert "buffer of the encoder" in setting.name  # for which floats take too much
            continue
        of_floats = floats_by_name[setting.name.lstrip("0123456789")]
        assert f"--moe-weights {weights}" in setting.flags
        assert ("--expert-store-dir DIR" in setting.flags) == ("--expert-store disk" in of_floats.flags)
        store = 12 * 128 * block if "disk" in setting.flags else 0
        assert setting.disk == of_floats.disk + store  # the checkpoint stays as it is
    saved = 12 * 128 * (2 * sizes.expert - block)
    everything = by_name(settings, "all experts")
    assert everything.device == by_name(floats, "all experts").device - saved
    assert everything.fits and not by_name(floats, "all experts").fits
    on_cpu = by_name(plan(sizes, 80 * GB, host=64 * GB, weights=weights), "CPU, buffer, disk")
    assert on_cpu.host <= 64 * GB and on_cpu.flags.startswith(f"--cpu --moe-weights {weights} --expert-buffer-size ")


def test_the_script_plans_quantised_experts(tmp_path, capsys):
    hf_makers.write_model(tmp_path / "hf")
    assert plan_command.main([str(tmp_path / "hf"), "--device-memory", "24GiB", "--moe-weights", "int8"]) == 0
    assert capsys.readouterr().out.count("--moe-weights int8") == 7


def test_shapes_of_no_model_are_refused():
    with pytest.raises(CheckpointError):
        ModelSizes.of_shapes({})


def test_a_dense_part_in_int8_is_what_a_loaded_model_takes(shared_goldens):
    golden = shared_goldens / "mt_nllb_ws2"
    sizes = read_sizes(str(golden / "checkpoint_last.pt"))
    all_of_it = ("--moe-weights", "int4", "--moe-weights-scope", "all")
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_last.pt", *commands.NLLB, "-t", "de")
    model, _ = commands.load("generate", *arguments, *all_of_it)
    blocks = bytes_in_int8(model)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    # a checkpoint also holds fairseq's versions, a number each
    assert blocks + kept <= sizes.dense_bytes(4, int8=True) <= blocks + kept + 64
    assert sizes.dense_bytes(4) > 3 * sizes.dense_bytes(4, int8=True)


def test_nllbs_dense_part_in_int8(capsys):
    sizes = read_sizes("moe_transformer_nllb_54b")
    assert sizes.dense_bytes(2, int8=True) == pytest.approx(2.83 * 2**30, rel=1e-2)
    settings = plan(sizes, 38 * GB, weights="int4", int8_dense=True)
    on_disk = by_name(settings, "disk and some RAM")
    assert by_name(settings, "all experts").fits and "--moe-weights int4 --moe-weights-scope all" in on_disk.flags
    assert not by_name(plan(sizes, 38 * GB, weights="int4"), "all experts").fits
    arguments = ["moe_transformer_nllb_54b", "--device-memory", "24GB", "--moe-weights-scope", "all"]
    assert plan_command.main([*arguments, "--moe-weights", "int8"]) == 0
    assert capsys.readouterr().out.count("--moe-weights int8 --moe-weights-scope all") == 6
    with pytest.raises(SystemExit):
        plan_command.main(arguments)
    assert "--moe-weights-scope all needs --moe-weights int8 or int4, got float" in capsys.readouterr().err
